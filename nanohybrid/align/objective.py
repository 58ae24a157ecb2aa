"""The objective of GRPO (Shao et al. 2024) as functions of tensors.

For each prompt a group of completions is sampled and rewarded. A completion's advantage is its reward against its group:

    A_i = (r_i - mean r) / (std r + 1e-4)        std over the group, with n - 1

and is the same for all its tokens t. With the probability ratio rho_t = exp(new_t - old_t) of the sampled token, the loss is

    l_t = -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + beta k_t        k_t = exp(ref_t - new_t) - (ref_t - new_t) - 1

where k_t >= 0 estimates the KL divergence from a reference model (Schulman's k3), off by default (beta 0). **Normalization is by
token**: the sum over all sampled tokens of the batch divided by their number, so a long completion weighs more than a short one
and its tokens no less (DAPO); the original divides within each completion first, which favors long wrong ones.

T sampled tokens, R completions.
"""

import torch
from torch import Tensor

EPSILON = 1e-4


def advantages(rewards_R: Tensor, group: int, by_deviation: bool = True) -> Tensor:
    """Advantage of each completion; groups of `group` lie one after another. A group of equal rewards teaches nothing: zeros."""
    grouped = rewards_R.view(-1, group)
    centerd = grouped - grouped.mean(1, keepdim=True)
    if by_deviation and group > 1:
        centerd = centerd / (grouped.std(1, keepdim=True) + EPSILON)
    return centerd.flatten()


def policy_loss(
    new_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float = 0.0,
    reference_T: Tensor | None = None,
) -> Tensor:
    """Loss of each sampled token from its log-probabilities now, when it was sampled, and under the reference model."""
    ratio_T = torch.exp(new_T - old_T)
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    if beta == 0 or reference_T is None:
        return loss_T
    behind_T = reference_T - new_T
    return loss_T + beta * (behind_T.exp() - behind_T - 1)
