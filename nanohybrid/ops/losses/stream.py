"""A loss on a head's logits, streamed over tokens: never more than [chunk, V] logits at once.

    loss_t = rule(W h_t)        dh_t = g_t W^T slope_t        dW = sum_t g_t slope_t h_t^T        slope_t = d loss_t / d logits_t

A Rule gives loss and slope of one chunk of logits. Two ways to use it:
- per token: loss_T comes back and backward makes each chunk's logits a second time, since g_t is not known before;
- summed: the sum comes back; g is one number, so forward makes both gradients at once and backward only scales them.

Matrix products run in the dtype of the hidden states (autocast's dtype under autocast); softmax and what is added up over
chunks are fp32 (fp64 for fp64 operands). Only the rows asked for are computed: a prompt without loss costs nothing here.

T tokens, R rows that have a loss, Q rows of a chunk, E hidden width, V vocabulary.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**25  # 128 MiB of fp32 logits at most
CHUNK_TOKENS = 1024


class Rule(Protocol):
    """Loss of a chunk of tokens from their logits, and its slope where it is wanted. It may overwrite the logits.

    Logits come in the dtype of the head's product. The loss is fp32 (fp64 for fp64); the slope may be as narrow as the logits.
    """

    def __call__(self, logits_QV: Tensor, rows_Q: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]: ...


def default_chunk(vocabulary: int) -> int:
    """Tokens of a chunk: enough rows for an efficient matrix product, few enough that the logits stay small."""
    return max(1, min(CHUNK_TOKENS, CHUNK_ELEMENTS // max(vocabulary, 1)))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and accumulation beside operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def streamed(
    hidden_TE: Tensor, weight_VE: Tensor, rows_R: Tensor, rule: Rule, chunk: int | None, summed: bool
) -> Tensor:
    """Loss of the rows: [T] with 0 elsewhere, or their sum."""
    size = default_chunk(weight_VE.shape[0]) if chunk is None else chunk
    if size < 1:
        raise ValueError(f"chunk is {size}, it must be at least 1 token")
    dtype = compute_dtype(hidden_TE)
    with torch.autocast(hidden_TE.device.type, enabled=False):
        if summed:
            return _Summed.apply(hidden_TE, weight_VE, rows_R, rule, size, dtype)
        return _PerToken.apply(hidden_TE, weight_VE, rows_R, rule, size, dtype)


class _Gradients:
    """Gradients of hidden states and weight, added to chunk by chunk."""

    def __init__(
        self, hidden_TE: Tensor, weight_VE: Tensor, wanted: tuple[bool, bool], dtype: torch.dtype
    ) -> None:
        self.hidden_TE = torch.zeros_like(hidden_TE) if wanted[0] else None
        self.weight_VE = torch.zeros_like(weight_VE, dtype=wide(dtype)) if wanted[1] else None

    def add(self, rows_Q: Tensor, slope_QV: Tensor, hidden_QE: Tensor, weight_VE: Tensor) -> None:
        slope_QV = slope_QV.to(weight_VE.dtype)
        if self.hidden_TE is not None:
            self.hidden_TE[rows_Q] = (slope_QV @ weight_VE).to(self.hidden_TE.dtype)
        if self.weight_VE is None:
            return
        if slope_QV.dtype == self.weight_VE.dtype:
            self.weight_VE.addmm_(slope_QV.T, hidden_QE)
        else:
            self.weight_VE += slope_QV.T @ hidden_QE


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: Tensor,
        weight_VE: Tensor,
        rows_R: Tensor,
        rule: Rule,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        loss_T = hidden_TE.new_zeros(hidden_TE.shape[0], dtype=wide(dtype))
        cast_VE = weight_VE.to(dtype)
        for rows_Q in rows_R.split(chunk):
            loss_T[rows_Q], _ = rule(hidden_TE[rows_Q].to(dtype) @ cast_VE.T, rows_Q, False)
        ctx.save_for_backward(hidden_TE, weight_VE, rows_R)
        ctx.rule, ctx.chunk, ctx.dtype = rule, chunk, dtype
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TE, weight_VE, rows_R = ctx.saved_tensors
        gradients = _Gradients(hidden_TE, weight_VE, ctx.needs_input_grad[:2], ctx.dtype)
        cast_VE = weight_VE.to(ctx.dtype)
        for rows_Q in rows_R.split(ctx.chunk):
            hidden_QE = hidden_TE[rows_Q].to(ctx.dtype)
            _, slope_QV = ctx.rule(hidden_QE @ cast_VE.T, rows_Q, True)
            gradients.add(rows_Q, slope_QV.mul_(upstream_T[rows_Q].unsqueeze(1)), hidden_QE, cast_VE)
        return gradients.hidden_TE, _to(gradients.weight_VE, weight_VE.dtype), None, None, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: Tensor,
        weight_VE: Tensor,
        rows_R: Tensor,
        rule: Rule,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        total = hidden_TE.new_zeros((), dtype=wide(dtype))
        wanted = ctx.needs_input_grad[:2]
        gradients = _Gradients(hidden_TE, weight_VE, wanted, dtype)
        cast_VE = weight_VE.to(dtype)
        for rows_Q in rows_R.split(chunk):
            hidden_QE = hidden_TE[rows_Q].to(dtype)
            loss_Q, slope_QV = rule(hidden_QE @ cast_VE.T, rows_Q, any(wanted))
            total += loss_Q.sum()
            if slope_QV is not None:
                gradients.add(rows_Q, slope_QV, hidden_QE, cast_VE)
        ctx.save_for_backward(gradients.hidden_TE, gradients.weight_VE)
        ctx.weight_dtype = weight_VE.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TE, weight_VE = ctx.saved_tensors
        scaled_TE = None if hidden_TE is None else hidden_TE * upstream.to(hidden_TE.dtype)
        scaled_VE = None if weight_VE is None else _to(weight_VE * upstream, ctx.weight_dtype)
        return scaled_TE, scaled_VE, None, None, None, None


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
