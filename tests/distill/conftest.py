"""Fixtures for the tests of distillation."""

from compress_models import calibration, dense, model  # noqa: F401
