"""Prompts, the embedding cache, pictures and clips as files."""
