"""Cross-entropy of a head without its [T, V] logits, and the log-probabilities that policy gradients need.

    loss_t = logsumexp(W h_t) - (W h_t)[target_t]        slope_t = softmax(W h_t) - onehot(target_t)

T tokens, Q tokens of a chunk, E hidden width, V vocabulary. Streaming, dtypes and chunks: stream.py.
"""

import torch
from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.losses.reference import IGNORED
from nanohybrid.ops.losses.stream import streamed, wide

NUMBA = Kernel("nanohybrid.ops.losses.numba:cross_entropy")
TRITON = Kernel("nanohybrid.ops.losses.kernels:cross_entropy")


def chunked_cross_entropy(
    hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, chunk: int | None = None
) -> Tensor:
    """Loss of each token in fp32, 0 where the target is -100. Backward makes the logits a second time, chunk by chunk."""
    return streamed(hidden_TE, weight_VE, _rows(targets_T), _CrossEntropy(targets_T), chunk, summed=False)


def summed_cross_entropy(
    hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, chunk: int | None = None
) -> Tensor:
    """Sum of the tokens' losses. Forward makes the gradients too, so that each logit is computed once: for training."""
    return streamed(hidden_TE, weight_VE, _rows(targets_T), _CrossEntropy(targets_T), chunk, summed=True)


def chunked_log_probs(
    hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, chunk: int | None = None
) -> Tensor:
    """Log-probability of each token's target in fp32, differentiable; 0 where the target is -100."""
    return -chunked_cross_entropy(hidden_TE, weight_VE, targets_T, chunk)


def _rows(targets_T: Tensor) -> Tensor:
    return (targets_T != IGNORED).nonzero().squeeze(1)


class _CrossEntropy:
    def __init__(self, targets_T: Tensor) -> None:
        self.targets_T = targets_T

    def __call__(self, logits_QV: Tensor, rows_Q: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        rule = choose(logits_QV, reference=chunk_loss, torch=chunk_loss, numba=NUMBA, triton=TRITON)
        found: tuple[Tensor, Tensor | None] = rule(logits_QV, self.targets_T[rows_Q], slope)
        return found


def chunk_loss(logits_QV: Tensor, targets_Q: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each token of a chunk, and its slope where it is wanted, in plain torch."""
    targets_Q1 = targets_Q.unsqueeze(1)
    log_p_QV = torch.log_softmax(logits_QV.to(wide(logits_QV.dtype)), dim=-1)
    loss_Q = -log_p_QV.gather(1, targets_Q1).squeeze(1)
    if not slope:
        return loss_Q, None
    slope_QV = log_p_QV.exp_()
    slope_QV.scatter_add_(1, targets_Q1, slope_QV.new_full((), -1.0).expand_as(targets_Q1))
    return loss_Q, slope_QV
