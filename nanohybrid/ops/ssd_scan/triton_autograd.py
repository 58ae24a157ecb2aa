"""The Triton form of the SSD scan, an autograd function over triton/ and backward/."""

from torch import Tensor

from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import triton
from nanohybrid.ops.ssd_scan.autograd import Scan
from nanohybrid.ops.ssd_scan.backward import ssd_scan_backward
from nanohybrid.ops.ssd_scan.inputs import SSDInputs


def ssd_scan(
    inputs: SSDInputs, layout: Layout, output_final_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """y_THP in fp32, and the final states (None unless `output_final_state`)."""
    if not wants_gradient(*inputs):
        return triton.ssd_scan(inputs, layout, output_final_state)
    y_THP, final_SHPN = Scan.apply(layout, output_final_state, triton.ssd_scan, ssd_scan_backward, *inputs)
    return y_THP, final_SHPN
