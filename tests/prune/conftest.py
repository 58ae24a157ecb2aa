"""Fixtures for the tests of pruning."""

from compress_models import calibration, dense, model  # noqa: F401
