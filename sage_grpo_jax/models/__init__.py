"""Models: the door, the registry behind it, and the families."""
