"""Checks that a model gives the same numbers however it is run: on every executor, cut, batched, cached, saved and resumed."""

from nanohybrid.verify.checks import verify
from nanohybrid.verify.result import CheckResult

__all__ = ["CheckResult", "verify"]
