"""Cross-entropy of a head without its [T, V] logits, and the log-probabilities that policy gradients need.

    loss_t = logsumexp(W h_t) - (W h_t)[target_t]
    dloss_t / dlogits_t = softmax(W h_t) - onehot(target_t)

T tokens, Q tokens of a chunk, E hidden size, V vocabulary. Chunking and dtypes: stream.py.
"""

import torch
from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.losses.reference import IGNORED
from nanohybrid.ops.losses.stream import accumulation_dtype, streamed_loss

NUMBA = Kernel("nanohybrid.ops.losses.numba:cross_entropy")
TRITON = Kernel("nanohybrid.ops.losses.kernels:cross_entropy")


def chunked_cross_entropy(
    hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, chunk: int | None = None
) -> Tensor:
    """The loss of each token in fp32, 0 where the target is -100.

    The backward pass recomputes the logits chunk by chunk.
    """
    return streamed_loss(
        hidden_TE, weight_VE, _rows(targets_T), _CrossEntropy(targets_T), chunk, summed=False
    )


def summed_cross_entropy(
    hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, chunk: int | None = None
) -> Tensor:
    """The sum of the tokens' losses.

    The forward pass also computes the gradients, so each logit is computed once: for training.
    """
    return streamed_loss(hidden_TE, weight_VE, _rows(targets_T), _CrossEntropy(targets_T), chunk, summed=True)


def chunked_log_probs(
    hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, chunk: int | None = None
) -> Tensor:
    """The log-probability of each token's target in fp32, differentiable; 0 where the target is -100."""
    return -chunked_cross_entropy(hidden_TE, weight_VE, targets_T, chunk)


def _rows(targets_T: Tensor) -> Tensor:
    return (targets_T != IGNORED).nonzero().squeeze(1)


class _CrossEntropy:
    def __init__(self, targets_T: Tensor) -> None:
        self.targets_T = targets_T

    def __call__(
        self, logits_QV: Tensor, rows_Q: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        rule = choose(logits_QV, reference=chunk_loss, torch=chunk_loss, numba=NUMBA, triton=TRITON)
        found: tuple[Tensor, Tensor | None] = rule(logits_QV, self.targets_T[rows_Q], with_gradient)
        return found


def chunk_loss(logits_QV: Tensor, targets_Q: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of each token of a chunk; with_gradient: and the gradient of its logits."""
    targets_Q1 = targets_Q.unsqueeze(1)
    log_p_QV = torch.log_softmax(logits_QV.to(accumulation_dtype(logits_QV.dtype)), dim=-1)
    loss_Q = -log_p_QV.gather(1, targets_Q1).squeeze(1)
    if not with_gradient:
        return loss_Q, None
    dlogits_QV = log_p_QV.exp_()
    dlogits_QV.scatter_add_(1, targets_Q1, dlogits_QV.new_full((), -1.0).expand_as(targets_Q1))
    return loss_Q, dlogits_QV
