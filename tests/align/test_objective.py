"""The GRPO loss against its equation, and against TRL where it is installed."""

import math
from collections import defaultdict
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from nanohybrid.align.objective import advantages, policy_loss


def literal_advantages(rewards: list[float], num_generations: int) -> list[float]:
    result = []
    for start in range(0, len(rewards), num_generations):
        members = rewards[start : start + num_generations]
        mean = sum(members) / num_generations
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in members) / (num_generations - 1))
        result += [(reward - mean) / (deviation + 1e-4) for reward in members]
    return result


def literal_loss(
    new: float, old: float, advantage: float, low: float, high: float, beta: float, reference: float
) -> float:
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    divergence = math.exp(reference - new) - (reference - new) - 1
    return -min(ratio * advantage, clipped * advantage) + beta * divergence


def samples(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new, old, advantage, reference = (
        torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    return [new * 0.5 - 1, old * 0.5 - 1, advantage, reference * 0.5 - 1]


def test_advantages_equal_the_equation() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.25, 0.5, 0.0]
    torch.testing.assert_close(
        advantages(torch.tensor(rewards), 3), torch.tensor(literal_advantages(rewards, 3))
    )
    plain = advantages(torch.tensor(rewards), 3, scale_rewards=False)
    torch.testing.assert_close(plain[:3], torch.tensor([2 / 3, -1 / 3, -1 / 3]))


def test_advantages_of_equal_rewards_are_zero() -> None:
    assert not advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), 2).any()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_policy_loss_and_its_gradient_equal_the_equation(beta: float) -> None:
    new_T, old_T, advantages_T, reference_T = samples()
    new_T.requires_grad_()
    loss_T = policy_loss(new_T, old_T, advantages_T, 0.2, 0.28, beta, reference_T)
    rows = list(zip(*(tensor.tolist() for tensor in (new_T, old_T, advantages_T, reference_T)), strict=True))
    expected = [literal_loss(n, o, a, 0.2, 0.28, beta, r) for n, o, a, r in rows]
    torch.testing.assert_close(loss_T, torch.tensor(expected, dtype=torch.float64))
    (slope_T,) = torch.autograd.grad(loss_T.sum(), new_T)
    step = 1e-6
    differences = [
        (literal_loss(n + step, o, a, 0.2, 0.28, beta, r) - literal_loss(n - step, o, a, 0.2, 0.28, beta, r))
        / (2 * step)
        for n, o, a, r in rows
    ]
    torch.testing.assert_close(slope_T, torch.tensor(differences, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_policy_loss_on_policy_has_the_advantage_as_gradient_and_clips_nothing() -> None:
    new_T, _, advantages_T, _ = samples()
    new_T.requires_grad_()
    (slope_T,) = torch.autograd.grad(policy_loss(new_T, new_T.detach(), advantages_T, 0.0, 0.0).sum(), new_T)
    torch.testing.assert_close(slope_T, -advantages_T)


def test_policy_loss_equals_trls_loss_and_gradient() -> None:
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    shape = (8, 25)
    new_T, old_T, _, reference_T = samples()
    advantages_R = samples(1)[2][: shape[0]]
    mask_RT = torch.arange(shape[1]) < torch.tensor([25, 3, 10, 1, 17, 8, 25, 2])[:, None]

    trainer = MagicMock()  # TRL's loss reads only settings and log-probabilities of the trainer
    trainer.configure_mock(
        beta=0.3, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo", importance_sampling_level="token"
    )
    trainer.configure_mock(
        use_vllm=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
    )
    trainer.model.training = False
    trainer.args.configure_mock(use_bias_correction_kl=False, delta=None)
    trainer.accelerator.gather = lambda tensor: tensor
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    theirs_T, ours_T = new_T.clone().requires_grad_(), new_T.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies.return_value = (theirs_T.view(shape), torch.zeros(shape), None)
    ids = torch.zeros(shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask_RT.long(),
        "advantages": advantages_R,
    }
    inputs |= {"old_per_token_logps": old_T.view(shape), "ref_per_token_logps": reference_T.view(shape)}
    theirs = trl.GRPOTrainer._compute_loss(trainer, MagicMock(training=False), inputs)

    counted_T = mask_RT.flatten()
    spread_T = advantages_R.repeat_interleave(shape[1])
    loss_T = policy_loss(
        ours_T[counted_T], old_T[counted_T], spread_T[counted_T], 0.2, 0.28, 0.3, reference_T[counted_T]
    )
    ours = loss_T.sum() / counted_T.sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, ours_T), torch.autograd.grad(theirs, theirs_T))
