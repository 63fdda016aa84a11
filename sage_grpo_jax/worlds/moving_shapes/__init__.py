"""The moving-shapes world: captions, renderer, analysis by synthesis."""
