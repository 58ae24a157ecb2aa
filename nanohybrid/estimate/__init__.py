"""Estimates: bytes and speed of a model when it serves, trains or is compressed, from what its mixers declare. Nothing is allocated."""

from nanohybrid.estimate.footprint import GIB, Footprint

__all__ = ["GIB", "Footprint"]
