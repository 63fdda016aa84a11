"""Makes `fake_backends` importable, here and, by PYTHONPATH, in servers that tests start."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
