"""The GRPO loss (Shao et al. 2024) as functions of tensors.

For each prompt, `num_generations` completions are sampled and rewarded. The advantage of a completion
compares its reward with its group, and holds for all its tokens t:

    A_i = (r_i - mean r) / (std r + 1e-4)        std over the group, with n - 1

With the probability ratio rho_t = exp(new_t - old_t) of the sampled token, the loss of a token is

    l_t = -min(rho_t A, clip(rho_t, 1 - epsilon, 1 + epsilon_high) A) + beta k_t
    k_t = exp(ref_t - new_t) - (ref_t - new_t) - 1

where k_t >= 0 estimates the KL divergence from a reference model (Schulman's k3 estimator); it is off by
default (beta 0). The **normalization is per token**: the sum over all sampled tokens of the batch, divided
by their number. All tokens weigh the same, in short and in long completions (DAPO, Yu et al. 2025). The
original averages within each completion first, which favors long wrong ones.

T sampled tokens, R completions.
"""

import torch
from torch import Tensor

STD_EPSILON = 1e-4


def advantages(rewards_R: Tensor, num_generations: int, scale_rewards: bool = True) -> Tensor:
    """Advantages [R] of completions whose groups lie one after another, in the dtype of the rewards.

    A group of equal rewards gets zeros. With `scale_rewards=False` the rewards are centered only (Dr. GRPO,
    Liu et al. 2025).
    """
    grouped = rewards_R.view(-1, num_generations)
    centered = grouped - grouped.mean(1, keepdim=True)
    if scale_rewards and num_generations > 1:
        centered = centered / (grouped.std(1, keepdim=True) + STD_EPSILON)
    return centered.flatten()


def policy_loss(
    log_probs_T: Tensor,
    old_log_probs_T: Tensor,
    advantages_T: Tensor,
    epsilon: float,
    epsilon_high: float,
    beta: float = 0.0,
    reference_log_probs_T: Tensor | None = None,
) -> Tensor:
    """Loss [T] of each sampled token.

    Log-probabilities: of the policy now, when it sampled, and of the reference model.
    """
    ratio_T = torch.exp(log_probs_T - old_log_probs_T)
    clipped_T = ratio_T.clamp(1 - epsilon, 1 + epsilon_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    if beta == 0 or reference_log_probs_T is None:
        return loss_T
    difference_T = reference_log_probs_T - log_probs_T
    return loss_T + beta * (difference_T.exp() - difference_T - 1)
