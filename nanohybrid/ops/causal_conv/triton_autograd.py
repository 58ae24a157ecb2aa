"""The Triton form of the convolution, an autograd function over triton.py and backward.py."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.causal_conv import torch as torch_form
from nanohybrid.ops.causal_conv import triton
from nanohybrid.ops.causal_conv.backward import causal_conv_backward
from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.layout import Layout


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_TC in fp32 and the last W - 1 inputs of each sequence (None unless `output_final_state`)."""
    if not wants_gradient(x_TC, weight_CW, bias_C, initial_SWC):
        return triton.causal_conv(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state)
    if initial_SWC is not None:  # training never continues from a state, so torch's gradient is enough
        return torch_form.causal_conv(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state)
    return _Conv.apply(x_TC, weight_CW, bias_C, layout, False), _last(
        x_TC, weight_CW, layout, output_final_state
    )


def conv_silu(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """silu(y_TC) in the dtype of x, and the last W - 1 inputs of each sequence (None unless
    `output_final_state`).
    """
    if not wants_gradient(x_TC, weight_CW, bias_C, initial_SWC):
        return triton.conv_silu(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state)
    if initial_SWC is not None:
        y_TC, last_SWC = torch_form.causal_conv(
            x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state
        )
        return F.silu(y_TC).to(x_TC.dtype), last_SWC
    return _Conv.apply(x_TC, weight_CW, bias_C, layout, True), _last(
        x_TC, weight_CW, layout, output_final_state
    )


def _last(x_TC: Tensor, weight_CW: Tensor, layout: Layout, output_final_state: bool) -> Tensor | None:
    return torch_form.last_inputs(x_TC, layout, None, weight_CW.shape[1] - 1) if output_final_state else None


class _Conv(Function):
    """Saves only its inputs for the backward pass, which recomputes the input of the SiLU."""

    @staticmethod
    def forward(
        ctx: Any, x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor, layout: Layout, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x_TC, weight_CW, bias_C)
        ctx.layout, ctx.silu = layout, silu
        return (triton.conv_silu if silu else triton.causal_conv)(
            x_TC, weight_CW, bias_C, layout, output_final_state=False
        )[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TC: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, weight_CW, bias_C = ctx.saved_tensors
        return *causal_conv_backward(dy_TC, x_TC, weight_CW, bias_C, ctx.layout, ctx.silu), None, None
