"""Makes the small networks of the moving-shapes world."""
