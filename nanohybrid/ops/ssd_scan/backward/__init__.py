"""The gradient of the SSD scan as Triton kernels, over ragged batches and from whatever states the sequences began with."""

from nanohybrid.ops.ssd_scan.backward.launch import ssd_scan_backward

__all__ = ["ssd_scan_backward"]
