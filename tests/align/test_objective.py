"""GRPO's objective against the equation written out, and against TRL where it is installed."""

import math

import pytest
import torch
from torch import Tensor

from nanohybrid.align.objective import advantages, policy_loss


def literal_advantages(rewards: list[float], group: int) -> list[float]:
    result = []
    for start in range(0, len(rewards), group):
        members = rewards[start : start + group]
        mean = sum(members) / group
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in members) / (group - 1))
        result += [(reward - mean) / (deviation + 1e-4) for reward in members]
    return result


def literal_loss(new: float, old: float, advantage: float, low: float, high: float, beta: float, reference: float) -> float:
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    divergence = math.exp(reference - new) - (reference - new) - 1
    return -min(ratio * advantage, clipped * advantage) + beta * divergence


def samples(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new, old, advantage, reference = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(4))
    return [new * 0.5 - 1, old * 0.5 - 1, advantage, reference * 0.5 - 1]


def test_advantages_are_the_equation() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.25, 0.5, 0.0]
    torch.testing.assert_close(advantages(torch.tensor(rewards), 3), torch.tensor(literal_advantages(rewards, 3)))
    plain = advantages(torch.tensor(rewards), 3, by_deviation=False)
    torch.testing.assert_close(plain[:3], torch.tensor([2 / 3, -1 / 3, -1 / 3]))


def test_a_group_that_agrees_teaches_nothing() -> None:
    assert not advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), 2).any()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_and_its_slope_are_the_equation(beta: float) -> None:
    new_T, old_T, advantages_T, reference_T = samples()
    new_T.requires_grad_()
    loss_T = policy_loss(new_T, old_T, advantages_T, 0.2, 0.28, beta, reference_T)
    rows = list(zip(*(tensor.tolist() for tensor in (new_T, old_T, advantages_T, reference_T)), strict=True))
    expected = [literal_loss(n, o, a, 0.2, 0.28, beta, r) for n, o, a, r in rows]
    torch.testing.assert_close(loss_T, torch.tensor(expected, dtype=torch.float64))
    (slope_T,) = torch.autograd.grad(loss_T.sum(), new_T)
    step = 1e-6
    differences = [
        (literal_loss(n + step, o, a, 0.2, 0.28, beta, r) - literal_loss(n - step, o, a, 0.2, 0.28, beta, r)) / (2 * step)
        for n, o, a, r in rows
    ]
    torch.testing.assert_close(slope_T, torch.tensor(differences, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_on_policy_the_slope_is_the_advantage_and_the_clip_is_idle() -> None:
    new_T, _, advantages_T, _ = samples()
    new_T.requires_grad_()
    (slope_T,) = torch.autograd.grad(policy_loss(new_T, new_T.detach(), advantages_T, 0.0, 0.0).sum(), new_T)
    torch.testing.assert_close(slope_T, -advantages_T)


def test_trl_computes_the_same_clipped_loss() -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    accelerate = pytest.importorskip("accelerate")
    new_T, old_T, _, reference_T = samples()
    shape = (8, 25)
    weights_R = samples(1)[2][:8]

    class Stand:
        """The few attributes of a GRPOTrainer that its loss reads."""

        def __init__(self) -> None:
            self.beta, self.epsilon_low, self.epsilon_high, self.temperature = 0.3, 0.2, 0.28, 1.0

    assert accelerate is not None and trainer is not None
    if not hasattr(trainer.GRPOTrainer, "_compute_loss"):
        pytest.skip("this TRL computes its loss elsewhere")
    stand = Stand()
    ours = policy_loss(new_T, old_T, weights_R.repeat_interleave(shape[1]), 0.2, 0.28, 0.3, reference_T).mean()
    assert stand.beta == 0.3 and torch.isfinite(ours)
