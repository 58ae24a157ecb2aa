"""The loss and its gradient for a chunk of logits as Triton kernels, with an online softmax.

The gradient overwrites the logits.

A program is a token. It reads the logits once for their maximum and sum (the sum is rescaled whenever the
maximum grows), and once more, from the cache, for the gradient: a row of 131,072 in bf16 is 256 KiB. Logits
stay in the dtype of the head's product; nothing of the size of a chunk of logits is ever stored in fp32.

Q tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import next_power_of_2

BLOCK = 4096  # logits per iteration


@triton.jit
def _online_logsumexp(largest, total, values):
    """The running maximum, and the sum of exponentials relative to it, after more values."""
    larger = tl.maximum(largest, tl.max(values, 0))
    return larger, total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), 0)


@triton.jit
def cross_entropy_rows(logits, targets, loss, stride, V, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """loss [Q]; with WITH_GRADIENT, softmax - onehot overwrites the logits."""
    row = tl.program_id(0)
    at, target = logits + row.to(tl.int64) * stride, tl.load(targets + row)
    picked = tl.load(at + target).to(tl.float32)
    largest, total = float("-inf"), 0.0
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        largest, total = _online_logsumexp(
            largest, total, tl.load(at + v, mask=v < V, other=float("-inf")).to(tl.float32)
        )
    log_sum = largest + tl.log(total)
    tl.store(loss + row, log_sum - picked)
    if WITH_GRADIENT:
        for second_first in range(0, V, BLOCK):
            w = second_first + tl.arange(0, BLOCK)
            p = tl.exp(tl.load(at + w, mask=w < V, other=float("-inf")).to(tl.float32) - log_sum)
            tl.store(at + w, tl.where(w == target, p - 1.0, p).to(logits.dtype.element_ty), mask=w < V)


@triton.jit
def forward_kl_rows(
    student, teacher, loss, stride, teacher_stride, V, tau, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """loss [Q]; with WITH_GRADIENT, tau (p^S - p^T) overwrites the student's logits."""
    row = tl.program_id(0)
    at, teacher_at = student + row.to(tl.int64) * stride, teacher + row.to(tl.int64) * teacher_stride
    largest, total, teacher_largest, teacher_total = float("-inf"), 0.0, float("-inf"), 0.0
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        largest, total = _online_logsumexp(
            largest, total, tl.load(at + v, mask=v < V, other=float("-inf")).to(tl.float32) / tau
        )
        teacher_v = tl.load(teacher_at + v, mask=v < V, other=float("-inf")).to(tl.float32) / tau
        teacher_largest, teacher_total = _online_logsumexp(teacher_largest, teacher_total, teacher_v)
    log_sum, teacher_log_sum = largest + tl.log(total), teacher_largest + tl.log(teacher_total)
    divergence = 0.0
    for second_first in range(0, V, BLOCK):
        w = second_first + tl.arange(0, BLOCK)
        log_p = tl.load(at + w, mask=w < V, other=0.0).to(tl.float32) / tau - log_sum
        log_q = tl.load(teacher_at + w, mask=w < V, other=0.0).to(tl.float32) / tau - teacher_log_sum
        q = tl.exp(log_q)
        divergence += tl.sum(tl.where(w < V, q * (log_q - log_p), 0.0), 0)
        if WITH_GRADIENT:
            tl.store(at + w, (tau * (tl.exp(log_p) - q)).to(student.dtype.element_ty), mask=w < V)
    tl.store(loss + row, tau * tau * divergence)


def cross_entropy(logits_QV: Tensor, targets_Q: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of each token in fp32; with_gradient: and the gradient, in the logits' memory and dtype."""
    Q, V = logits_QV.shape
    loss_Q = torch.empty(Q, dtype=torch.float32, device=logits_QV.device)
    cross_entropy_rows[Q,](
        logits_QV,
        targets_Q,
        loss_Q,
        logits_QV.stride(0),
        V,
        WITH_GRADIENT=with_gradient,
        BLOCK=_block(V),
        num_warps=8,
    )
    return loss_Q, logits_QV if with_gradient else None


def forward_kl(
    logits_QV: Tensor, teacher_QV: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student) of each token in fp32, and where `with_gradient` the gradient, in the student's
    logits' memory and dtype.
    """
    Q, V = logits_QV.shape
    loss_Q = torch.empty(Q, dtype=torch.float32, device=logits_QV.device)
    forward_kl_rows[Q,](
        logits_QV, teacher_QV, loss_Q, logits_QV.stride(0), teacher_QV.stride(0), V, float(temperature),
        WITH_GRADIENT=with_gradient, BLOCK=_block(V), num_warps=8,
    )  # fmt: skip
    return loss_Q, logits_QV if with_gradient else None


def _block(V: int) -> int:
    return min(BLOCK, next_power_of_2(V))
