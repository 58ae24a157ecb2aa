"""Forward KL from a teacher of which only the top-k tokens and the total probability of all others are known.

    KL_t = tau^2 (sum_{v in top k} p_v (log p_v - log s_v) + p_rest (log p_rest - log s_rest))

with p the teacher's and s the student's probabilities at temperature tau.

It has k + 1 outcomes instead of V, so it is at most the full divergence, and equal to it with k = V. Among
the other tokens the student is free:

    dKL_t / dlogits_v = tau (s_v - p_v) in the top k,        tau s_v (1 - p_rest / s_rest) elsewhere

T tokens, R rows that have a loss, Q rows of a chunk, E hidden size, V vocabulary, K tokens of the top k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.ops.losses.stream import accumulation_dtype, streamed_loss


@dataclass(frozen=True)
class TopK:
    """A teacher at the rows that have a loss: token ids int64 [R, K], their log-probabilities [R, K], the log
    of the others' total [R].
    """

    ids_RK: Tensor
    log_p_RK: Tensor
    log_rest_R: Tensor

    def to(self, device: torch.device | str) -> "TopK":
        """The same on a device."""
        return TopK(self.ids_RK.to(device), self.log_p_RK.to(device), self.log_rest_R.to(device))


def top_k_of(logits_RV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The top-k tokens of each row, and the log of the others' total probability (-inf without others)."""
    log_p_RV = torch.log_softmax(logits_RV.to(accumulation_dtype(logits_RV.dtype)) / temperature, dim=-1)
    log_p_RK, ids_RK = log_p_RV.topk(min(k, log_p_RV.shape[-1]), dim=-1)
    return TopK(ids_RK, log_p_RK, rest(log_p_RV, ids_RK))


def rest(log_p_RV: Tensor, ids_RK: Tensor) -> Tensor:
    """[R]: the log of the total probability of all but the given tokens, summed over those others."""
    return log_p_RV.scatter(1, ids_RK, float("-inf")).logsumexp(dim=-1)


def summed_top_k_kl(
    student_TE: Tensor, student_VE: Tensor, rows_R: Tensor, teacher: TopK, temperature: float = 1.0
) -> Tensor:
    """The sum over `rows_R`, in the order of the teacher's rows; for training, as `summed_forward_kl`."""
    index_T = torch.zeros(student_TE.shape[0], dtype=torch.int64, device=rows_R.device)
    index_T[rows_R] = torch.arange(len(rows_R), device=rows_R.device)
    return streamed_loss(
        student_TE, student_VE, rows_R, _TopKKL(teacher, index_T, temperature), None, summed=True
    )


class _TopKKL:
    def __init__(self, teacher: TopK, index_T: Tensor, temperature: float) -> None:
        self.teacher, self.index_T, self.temperature = teacher, index_T, temperature

    def __call__(
        self, logits_QV: Tensor, rows_Q: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        tau, at_Q = self.temperature, self.index_T[rows_Q]
        ids_QK, log_p_QK = self.teacher.ids_RK[at_Q], self.teacher.log_p_RK[at_Q].to(logits_QV.dtype)
        log_rest_Q = self.teacher.log_rest_R[at_Q].to(logits_QV.dtype)
        log_s_QV = torch.log_softmax(logits_QV.div_(tau), dim=-1)
        log_s_QK, log_s_rest_Q = log_s_QV.gather(1, ids_QK), rest(log_s_QV, ids_QK)
        p_QK, some_Q = log_p_QK.exp(), log_rest_Q > float("-inf")
        ratio_Q = torch.where(some_Q, log_rest_Q - log_s_rest_Q, 0.0)
        kl_Q = tau**2 * ((p_QK * (log_p_QK - log_s_QK)).sum(-1) + log_rest_Q.exp() * ratio_Q)
        if not with_gradient:
            return kl_Q, None
        s_QV = log_s_QV.exp_()
        top_QK = s_QV.gather(1, ids_QK) - p_QK
        s_QV.mul_((1 - torch.where(some_Q, ratio_Q.exp(), 0.0))[:, None]).scatter_(1, ids_QK, top_QK)
        return kl_Q, s_QV.mul_(tau)
