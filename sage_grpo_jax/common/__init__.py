"""Small helpers that every room may use: progress lines, whole files."""
