"""Forward KL from a teacher's head to a student's, for distillation, without the [T, V] logits of either.

    KL_t = tau^2 sum_v p^T_t[v] (log p^T_t[v] - log p^S_t[v])        p = softmax(logits / tau)
    dKL_t / dlogits_t = tau (p^S_t - p^T_t)

The tau^2 preserves the size of the gradient when tau changes (Hinton et al. 2015). The teacher's hidden
states and head get no gradient. The hidden sizes of teacher and student may differ, the vocabularies may not.
T tokens, Q tokens of a chunk, E hidden size (each its own), V vocabulary.
"""

import torch
from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.losses.stream import accumulation_dtype, compute_dtype, streamed_loss


def chunked_forward_kl(
    student_TE: Tensor,
    student_VE: Tensor,
    teacher_TE: Tensor,
    teacher_VE: Tensor,
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """KL(teacher || student) of each token in fp32, times temperature^2; 0 where the mask is False."""
    rule = _ForwardKL(teacher_TE.detach(), teacher_VE.detach(), temperature)
    return streamed_loss(student_TE, student_VE, _rows(student_TE, mask_T), rule, chunk, summed=False)


def summed_forward_kl(
    student_TE: Tensor,
    student_VE: Tensor,
    teacher_TE: Tensor,
    teacher_VE: Tensor,
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The sum over the tokens of the mask.

    Both heads run once, since the forward pass also computes the gradients: for training.
    """
    rule = _ForwardKL(teacher_TE.detach(), teacher_VE.detach(), temperature)
    return streamed_loss(student_TE, student_VE, _rows(student_TE, mask_T), rule, chunk, summed=True)


def _rows(hidden_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    if mask_T is None:
        return torch.arange(hidden_TE.shape[0], device=hidden_TE.device)
    return mask_T.nonzero().squeeze(1)


class _ForwardKL:
    def __init__(self, teacher_TE: Tensor, teacher_VE: Tensor, temperature: float) -> None:
        self.teacher_TE = teacher_TE
        self.teacher_VE = teacher_VE.to(compute_dtype(teacher_TE))
        self.temperature = temperature

    def __call__(
        self, logits_QV: Tensor, rows_Q: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        teacher_QV = self.teacher_TE[rows_Q].to(self.teacher_VE.dtype) @ self.teacher_VE.T
        kernel = Kernel("nanohybrid.ops.losses.kernels:forward_kl")
        rule = choose(logits_QV, teacher_QV, reference=_chunk, torch=_chunk, triton=kernel)
        found: tuple[Tensor, Tensor | None] = rule(logits_QV, teacher_QV, self.temperature, with_gradient)
        return found


def _chunk(
    logits_QV: Tensor, teacher_QV: Tensor, tau: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = accumulation_dtype(logits_QV.dtype)
    log_teacher_QV = torch.log_softmax(teacher_QV.to(dtype).div_(tau), dim=-1)
    log_student_QV = torch.log_softmax(logits_QV.to(dtype).div_(tau), dim=-1)
    teacher_QV = log_teacher_QV.exp()
    kl_Q = tau**2 * (teacher_QV * log_teacher_QV.sub_(log_student_QV)).sum(-1)
    return kl_Q, log_student_QV.exp_().sub_(teacher_QV).mul_(tau) if with_gradient else None
