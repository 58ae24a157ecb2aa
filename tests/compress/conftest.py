"""Fixtures for the tests of compression."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for compress_kill.py and test_compress_stage.py

from compress_models import calibration, dense, model  # noqa: F401
