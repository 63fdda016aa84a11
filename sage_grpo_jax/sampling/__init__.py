"""Videos from weights or checkpoints: settings, compiled sampler, files."""
