"""The device mesh and the mapping of logical axis names onto it."""
