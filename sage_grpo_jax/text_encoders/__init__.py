"""The frozen encoders of HunyuanVideo-1.5's conditions, run once, offline, through PyTorch.

The only part of the package besides reward backends that needs torch and transformers; both are
imported when an encoder is opened.
"""
