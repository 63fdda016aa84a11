"""Many runs: sweeps and reports."""
