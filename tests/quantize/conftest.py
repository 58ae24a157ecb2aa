"""Fixtures for the tests of quantizing."""

from compress_models import calibration, dense, model  # noqa: F401
