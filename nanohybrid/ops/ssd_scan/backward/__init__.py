"""The gradient of the SSD scan as Triton kernels, over ragged batches and from any initial states."""

from nanohybrid.ops.ssd_scan.backward.launch import ssd_scan_backward

__all__ = ["ssd_scan_backward"]
