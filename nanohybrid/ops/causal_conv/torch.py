"""The causal convolution as W shifted products.

Rows that would cross a document border are set to zero, not multiplied by zero, so that not even a NaN passes
from one document to the next.

T tokens · S sequences · C channels · W window · k distance back, 1 to W - 1.
"""

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.causal_conv import window
from nanohybrid.ops.layout import Layout


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_TC and the last W - 1 inputs of each sequence (None unless `output_final_state`)."""
    if initial_SWC is not None and layout.max_length == 1:
        return window.causal_conv(x_TC, weight_CW, bias_C, initial_SWC)
    dtype = torch.promote_types(x_TC.dtype, torch.float32)
    W = weight_CW.shape[1]
    borders = [_rows_within(layout, k, x_TC.device) for k in range(1, W)]
    with torch.autocast(x_TC.device.type, enabled=False):
        weight, bias = weight_CW.to(dtype), bias_C.to(dtype)
        y_TC = _Shifted.apply(x_TC.to(dtype), weight, bias, borders)
        if initial_SWC is not None:
            y_TC = _add_stored(y_TC, weight, layout, initial_SWC.to(dtype))
    return y_TC, last_inputs(x_TC, layout, initial_SWC, W - 1) if output_final_state else None


def _rows_within(layout: Layout, k: int, device: torch.device) -> Tensor:
    """Rows that have fewer than k predecessors of their own sequence in this batch."""
    return layout.tensor(f"conv{k}", device, lambda: np.flatnonzero(layout.offsets() < k))


class _Shifted(torch.autograd.Function):
    """sum_k weight_k x_{t-k} with x zero before each sequence.

    Both passes read x and its gradient W times.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, borders: list[Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        W = weight.shape[1]
        y = torch.addcmul(bias, x, weight[:, W - 1])
        for k, border in enumerate(borders, start=1):
            if k < len(x):
                y.addcmul_(_shift(x, k, border), weight[:, W - 1 - k])
        ctx.save_for_backward(x, weight)
        ctx.borders = borders
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        W = weight.shape[1]
        grad_x = grad * weight[:, W - 1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, W - 1] = (grad * x).sum(0)
        for k, border in enumerate(ctx.borders, start=1):
            if k < len(x):
                seen = grad.index_fill(0, border, 0)[k:]
                grad_x[:-k].addcmul_(seen, weight[:, W - 1 - k])
                grad_weight[:, W - 1 - k] = (seen * x[:-k]).sum(0)
        return grad_x, grad_weight, grad.sum(0), None


def _shift(x: Tensor, k: int, border: Tensor) -> Tensor:
    """Row t holds x_{t-k}, zero in the rows `border`."""
    return torch.cat([x[:k], x[:-k]]).index_fill_(0, border, 0)


def _add_stored(y_TC: Tensor, weight_CW: Tensor, layout: Layout, initial_SWC: Tensor) -> Tensor:
    """Add the contribution of the inputs of earlier calls to the first W - 1 outputs of each sequence."""
    W = weight_CW.shape[1]
    rows, parts = [], []
    for offset in range(W - 1):
        reach = [i for i, length in enumerate(layout.lengths) if length > offset]
        if reach:
            rows += [layout.starts[i] + offset for i in reach]
            stored = initial_SWC if len(reach) == layout.sequences else initial_SWC[reach]
            parts.append(torch.einsum("SWC,CW->SC", stored[:, offset:], weight_CW[:, : W - 1 - offset]))
    return y_TC.index_add(0, torch.tensor(rows, device=y_TC.device), torch.cat(parts)) if rows else y_TC


def last_inputs(x_TC: Tensor, layout: Layout, initial_SWC: Tensor | None, count: int) -> Tensor:
    """The last `count` inputs of each sequence, with inputs of earlier calls where it is shorter."""
    S, C = layout.sequences, x_TC.shape[1]
    stored = x_TC.new_zeros(S, count, C) if initial_SWC is None else initial_SWC.to(x_TC.dtype)
    history = torch.cat([x_TC, stored.flatten(0, 1)])

    def index() -> np.ndarray:
        back = np.arange(count, 0, -1)[None, :]  # the last input is 1 back from the end
        lengths, ends = np.asarray(layout.lengths)[:, None], np.asarray(layout.starts[1:])[:, None]
        old = layout.tokens + np.arange(S)[:, None] * count + count + lengths - back
        return np.where(back <= lengths, ends - back, old).ravel()

    return history.index_select(0, layout.tensor(f"conv_last{count}", x_TC.device, index)).view(S, count, C)
