"""The policy: its networks, its conditions, and how it samples."""
