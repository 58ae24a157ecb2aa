"""The numba form of the squared ReLU: one pass over memory forward and one backward. Only x is saved."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanohybrid.ops.numba import pointwise
from nanohybrid.ops.numba.threads import num_threads, run
from nanohybrid.ops.squared_relu import torch as torch_form


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 in x's dtype."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return torch_form.squared_relu(x)
    y: Tensor = _SquaredReLU.apply(x)
    return y


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty(x.shape, dtype=x.dtype)
        run(
            pointwise.relu2_forward,
            x.numel(),
            x.data_ptr(),
            y.data_ptr(),
            x.dtype == torch.bfloat16,
            size=num_threads(2 * x.nbytes),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype)
        addresses = x.data_ptr(), dy.data_ptr(), dx.data_ptr()
        run(
            pointwise.relu2_backward,
            x.numel(),
            *addresses,
            x.dtype == torch.bfloat16,
            size=num_threads(3 * x.nbytes),
        )
        return dx
