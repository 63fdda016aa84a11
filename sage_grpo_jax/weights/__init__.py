"""Reading and writing model weights in the layouts that others use."""
