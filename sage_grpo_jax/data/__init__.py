"""Prompts, the embedding cache, and the moving-shapes world."""
