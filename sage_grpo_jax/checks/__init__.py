"""Independent checks of a run: float64 shadow, programs lowered for other devices."""
