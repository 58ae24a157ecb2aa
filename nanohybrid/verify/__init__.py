"""Proofs, on any checkpoint and machine, of what silently breaks hybrid models elsewhere: that however work is packed, cut,
stepped, batched, saved or interrupted, the results are the same."""

from nanohybrid.verify.line import Line
from nanohybrid.verify.proofs import PROOFS, verify

__all__ = ["PROOFS", "Line", "verify"]
