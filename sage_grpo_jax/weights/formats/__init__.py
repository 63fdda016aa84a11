"""File formats: safetensors, PyTorch's zip archives, orbax. They know no model."""
