"""The HunyuanVideo-1.5 architecture: video DiT and VAE."""
