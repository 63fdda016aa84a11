"""Reward models that the server can host."""
