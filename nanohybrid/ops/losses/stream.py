"""A loss on a head's logits, computed chunk by chunk over tokens: at most [chunk, V] logits exist at a time.

    loss_t = rule(W h_t)                d_t = d loss_t / d logits_t
    dh_t = g_t W^T d_t                  dW = sum_t g_t d_t h_t^T

A Rule computes the loss and its gradient d for one chunk of logits. There are two ways to use it:
- per token: loss_T is returned. The backward pass recomputes each chunk's logits, since g_t is not known
  before.
- summed: the sum is returned. g is one number, so the forward pass computes both gradients, and the backward
  pass only scales them.

Matrix products run in the dtype of the hidden states (under autocast, in autocast's dtype). The softmax and
sums over chunks are fp32 (fp64 for fp64 operands). Only the given rows are computed: a prompt without loss
costs nothing here.

T tokens, R rows that have a loss, Q rows of a chunk, E hidden size, V vocabulary.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**25  # 128 MiB of fp32 logits at most
CHUNK_TOKENS = 1024


class Rule(Protocol):
    """The loss of a chunk of tokens from their logits, and its gradient where `with_gradient`.

    It may overwrite the logits.

    Logits come in the dtype of the head's product. The loss is fp32 (fp64 for fp64); the gradient may have
    the logits' dtype.
    """

    def __call__(
        self, logits_QV: Tensor, rows_Q: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]: ...


def default_chunk(vocabulary: int) -> int:
    """Tokens of a chunk: enough for an efficient matrix product, few enough for small logits."""
    return max(1, min(CHUNK_TOKENS, CHUNK_ELEMENTS // max(vocabulary, 1)))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is enabled, else that of the hidden states."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def streamed_loss(
    hidden_TE: Tensor, weight_VE: Tensor, rows_R: Tensor, rule: Rule, chunk: int | None, summed: bool
) -> Tensor:
    """The loss of the rows: [T] with 0 elsewhere, or where `summed` their sum.

    Raises ValueError for a chunk below 1.
    """
    size = default_chunk(weight_VE.shape[0]) if chunk is None else chunk
    if size < 1:
        raise ValueError(f"chunk is {size}, it must be at least 1 token")
    dtype = compute_dtype(hidden_TE)
    with torch.autocast(hidden_TE.device.type, enabled=False):
        if summed:
            return _Summed.apply(hidden_TE, weight_VE, rows_R, rule, size, dtype)
        return _PerToken.apply(hidden_TE, weight_VE, rows_R, rule, size, dtype)


class _Gradients:
    """The gradients of hidden states and weight, accumulated chunk by chunk."""

    def __init__(
        self, hidden_TE: Tensor, weight_VE: Tensor, wanted: tuple[bool, bool], dtype: torch.dtype
    ) -> None:
        self.hidden_TE = torch.zeros_like(hidden_TE) if wanted[0] else None
        self.weight_VE = torch.zeros_like(weight_VE, dtype=accumulation_dtype(dtype)) if wanted[1] else None

    def add(self, rows_Q: Tensor, dlogits_QV: Tensor, hidden_QE: Tensor, weight_VE: Tensor) -> None:
        """Add a chunk, given the gradient of its logits."""
        dlogits_QV = dlogits_QV.to(weight_VE.dtype)
        if self.hidden_TE is not None:
            self.hidden_TE[rows_Q] = (dlogits_QV @ weight_VE).to(self.hidden_TE.dtype)
        if self.weight_VE is None:
            return
        if dlogits_QV.dtype == self.weight_VE.dtype:
            self.weight_VE.addmm_(dlogits_QV.T, hidden_QE)
        else:
            self.weight_VE += dlogits_QV.T @ hidden_QE


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
        loss_T = hidden_TE.new_zeros(hidden_TE.shape[0], dtype=accumulation_dtype(dtype))
        cast_VE = weight_VE.to(dtype)
        for rows_Q in rows_R.split(chunk):
            loss_T[rows_Q], _ = rule(hidden_TE[rows_Q].to(dtype) @ cast_VE.T, rows_Q, False)
        ctx.save_for_backward(hidden_TE, weight_VE, rows_R)
        ctx.rule, ctx.chunk, ctx.dtype = rule, chunk, dtype
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TE, weight_VE, rows_R = ctx.saved_tensors
        gradients = _Gradients(hidden_TE, weight_VE, ctx.needs_input_grad[:2], ctx.dtype)
        cast_VE = weight_VE.to(ctx.dtype)
        for rows_Q in rows_R.split(ctx.chunk):
            hidden_QE = hidden_TE[rows_Q].to(ctx.dtype)
            _, dlogits_QV = ctx.rule(hidden_QE @ cast_VE.T, rows_Q, True)
            gradients.add(rows_Q, dlogits_QV.mul_(grad_T[rows_Q].unsqueeze(1)), hidden_QE, cast_VE)
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
        total = hidden_TE.new_zeros((), dtype=accumulation_dtype(dtype))
        wanted = ctx.needs_input_grad[:2]
        gradients = _Gradients(hidden_TE, weight_VE, wanted, dtype)
        cast_VE = weight_VE.to(dtype)
        for rows_Q in rows_R.split(chunk):
            hidden_QE = hidden_TE[rows_Q].to(dtype)
            loss_Q, dlogits_QV = rule(hidden_QE @ cast_VE.T, rows_Q, any(wanted))
            total += loss_Q.sum()
            if dlogits_QV is not None:
                gradients.add(rows_Q, dlogits_QV, hidden_QE, cast_VE)
        ctx.save_for_backward(gradients.hidden_TE, gradients.weight_VE)
        ctx.weight_dtype = weight_VE.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TE, weight_VE = ctx.saved_tensors
        scaled_TE = None if hidden_TE is None else hidden_TE * grad.to(hidden_TE.dtype)
        scaled_VE = None if weight_VE is None else _to(weight_VE * grad, ctx.weight_dtype)
        return scaled_TE, scaled_VE, None, None, None, None


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
