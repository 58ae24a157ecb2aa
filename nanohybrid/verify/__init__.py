"""Checks that a model gives the same numbers on every executor, and if chunked, batched, cached, saved or resumed."""

from nanohybrid.verify.checks import verify
from nanohybrid.verify.result import CheckResult

__all__ = ["CheckResult", "verify"]
