"""The configuration: fields, checks, method presets, and the plan made from them."""
