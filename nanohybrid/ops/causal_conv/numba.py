"""The numba form of the convolution with SiLU, an autograd function over ops/numba/causal_conv.py."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.causal_conv import torch as torch_form
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.numba import causal_conv as kernels
from nanohybrid.ops.numba.threads import num_threads, run


def conv_silu(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """silu(causal_conv) in the dtype of x, and the last W - 1 inputs of each sequence (None unless
    `output_final_state`).
    """

    # Training never continues from a state, so the kernels start from zeros.
    if initial_SWC is not None or x_TC.dtype not in (torch.float32, torch.bfloat16):
        y_TC, last_SWC = torch_form.causal_conv(
            x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state
        )
        return F.silu(y_TC).to(x_TC.dtype), last_SWC
    last_SWC = (
        torch_form.last_inputs(x_TC, layout, None, weight_CW.shape[1] - 1) if output_final_state else None
    )
    return _Conv.apply(x_TC, weight_CW, bias_C, layout), last_SWC


class _Conv(Function):
    """Saves only its inputs for the backward pass, which recomputes the input of the SiLU."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x_TC, weight_CW, bias_C)
        ctx.layout = layout
        y_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype)
        x, weight_WC, bias = _prepared(x_TC, weight_CW, bias_C)
        addresses = x.data_ptr(), weight_WC.data_ptr(), bias.data_ptr(), y_TC.data_ptr()
        run(
            kernels.conv_forward,
            *_shape(x, weight_WC, layout),
            *addresses,
            x.dtype == torch.bfloat16,
            size=num_threads(2 * y_TC.nbytes),
        )
        return y_TC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TC: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, weight_CW, bias_C = ctx.saved_tensors
        x, weight_WC, bias = _prepared(x_TC, weight_CW, bias_C)
        dy_TC = dy_TC.contiguous()
        dx_TC, dweight_WC, dbias_C = (
            torch.empty(x.shape, dtype=x.dtype),
            torch.empty(weight_WC.shape),
            torch.empty(bias.shape),
        )
        addresses = [tensor.data_ptr() for tensor in (x, weight_WC, bias, dy_TC, dx_TC, dweight_WC, dbias_C)]
        run(
            kernels.conv_backward,
            *_shape(x, weight_WC, layout=ctx.layout),
            *addresses,
            x.dtype == torch.bfloat16,
            size=num_threads(3 * dx_TC.nbytes),
        )
        return dx_TC, dweight_WC.t().to(weight_CW.dtype), dbias_C.to(bias_C.dtype), None


def _prepared(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x with contiguous rows; the weight in fp32, tap by tap; the bias in fp32."""
    x = x_TC.detach() if x_TC.stride(1) == 1 else x_TC.detach().contiguous()
    return x, weight_CW.detach().float().t().contiguous(), bias_C.detach().float().contiguous()


def _shape(x: Tensor, weight_WC: Tensor, layout: Layout) -> tuple[Any, ...]:
    """The first arguments of both kernels."""
    return (
        layout.sequences,
        np.asarray(layout.starts, dtype=np.int64),
        x.shape[1],
        len(weight_WC),
        x.stride(0),
    )
