"""The losses of a language-model head as equations: the reference for the chunked versions.

    logits_t = W h_t                            log p_t = logits_t - logsumexp(logits_t)
    cross entropy     l_t  = -log p_t[target_t]
    log-probability   lp_t = log p_t[target_t]
    forward KL        KL_t = tau^2 sum_v p^T_t[v] (log p^T_t[v] - log p^S_t[v]),   p = softmax(logits / tau)

p^T is the teacher's distribution, p^S the student's. The factor tau^2 (Hinton et al. 2015) preserves the size
of the gradient when the temperature tau changes, since the gradient of the student's logits is tau (p^S -
p^T).

T tokens, E hidden size, V vocabulary.
"""

import torch
from torch import Tensor

IGNORED = -100  # a target without a loss, as torch's ignore_index


def cross_entropy(hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor) -> Tensor:
    """The loss of each token; 0 where the target is IGNORED."""
    return -log_probs(hidden_TE, weight_VE, targets_T)


def log_probs(hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor) -> Tensor:
    """The log-probability of each token's target; 0 where the target is IGNORED."""
    log_p_TV = torch.log_softmax(hidden_TE @ weight_VE.T, dim=-1)
    counted_T = targets_T != IGNORED
    picked_T = log_p_TV.gather(1, targets_T.clamp_min(0).unsqueeze(1)).squeeze(1)
    return torch.where(counted_T, picked_T, torch.zeros_like(picked_T))


def forward_kl(
    student_TE: Tensor,
    student_VE: Tensor,
    teacher_TE: Tensor,
    teacher_VE: Tensor,
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of each token times temperature^2; 0 where the mask is False.

    The teacher gets no gradient.
    """
    student_TV = torch.log_softmax(student_TE @ student_VE.T / temperature, dim=-1)
    teacher_TV = torch.log_softmax(teacher_TE @ teacher_VE.T / temperature, dim=-1).detach()
    kl_T = temperature**2 * (teacher_TV.exp() * (teacher_TV - student_TV)).sum(-1)
    return kl_T if mask_T is None else torch.where(mask_T, kl_T, torch.zeros_like(kl_T))
