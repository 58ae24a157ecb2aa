"""Depthwise causal convolution over a ragged batch; the last inputs carry over between calls."""

import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.causal_conv import reference
from nanohybrid.ops.causal_conv import torch as torch_form
from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.layout import Layout

NUMBA = Kernel("nanohybrid.ops.causal_conv.numba:conv_silu", gradients=True)
PLAIN = Kernel("nanohybrid.ops.causal_conv.triton_autograd:causal_conv", gradients=True)
WITH_SILU = Kernel("nanohybrid.ops.causal_conv.triton_autograd:conv_silu", gradients=True)


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_t = bias + sum_k weight[:, W-1-k] x_{t-k} within each sequence, without activation.

    initial_SWC [S, W-1, C]: the inputs before this batch, the latest last; None is zeros. Returns y in fp32
    (float64 for float64) and, where `output_final_state`, the inputs that the next call needs, [S, W-1, C] in
    the dtype of x, else None.
    """
    conv = choose(
        x_TC,
        weight_CW,
        bias_C,
        initial_SWC,
        reference=reference.causal_conv,
        torch=torch_form.causal_conv,
        triton=PLAIN,
    )
    y_TC, last_SWC = conv(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state)
    return y_TC, last_SWC


def conv_silu(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """silu(causal_conv) in the dtype of x, computed in fp32 (float64 for float64); and the final state as
    causal_conv returns it.
    """
    conv = choose(
        x_TC,
        weight_CW,
        bias_C,
        initial_SWC,
        reference=_then_silu,
        torch=_then_silu,
        numba=NUMBA,
        triton=WITH_SILU,
    )
    y_TC, last_SWC = conv(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state)
    return y_TC, last_SWC


def _then_silu(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    y_TC, last_SWC = causal_conv(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state)
    return F.silu(y_TC).to(x_TC.dtype), last_SWC
