"""Weight tables: how each codebase names and lays out the tensors of each model."""
