"""The frozen encoders of the models' conditions, run once, offline, through PyTorch.

The only part of the package besides reward backends that needs torch and transformers; both are
imported when an encoder is opened.
"""
