"""Rollouts: completions that the model of this moment samples, with their rewards, as a batch to learn from.

Everything is a function of (weights, seed, step): problems are drawn from a generator of the step, each completion has a seed of
its own, and a completion does not depend on which others run beside it. So a resumed run samples what the whole one did.

T tokens of the batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid import tasks
from nanohybrid.align.chats import ChatMaker
from nanohybrid.engine import Completion, Engine, SamplingParams
from nanohybrid.model import HybridLM
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.losses import IGNORED
from nanohybrid.tasks import Problem


@dataclass(frozen=True)
class Rollout:
    """One completion of a problem and what it was worth."""

    problem: Problem
    prompt: list[int]
    completion: Completion
    reward: float


@dataclass(frozen=True)
class PolicyBatch:
    """Prompts with their completions, end to end. A target is a token that the policy sampled; elsewhere it is -100.

    advantages_T and old_T (log-probabilities when sampled) stand where the target does.
    """

    tokens_T: Tensor
    targets_T: Tensor
    advantages_T: Tensor
    old_T: Tensor
    layout: Layout

    @property
    def target_count(self) -> int:
        """Sampled tokens."""
        return int((self.targets_T != IGNORED).sum())

    def to(self, device: torch.device) -> "PolicyBatch":
        """The same batch on a device."""
        tokens_T, targets_T, advantages_T, old_T = (
            tensor.to(device) for tensor in (self.tokens_T, self.targets_T, self.advantages_T, self.old_T)
        )
        return PolicyBatch(tokens_T, targets_T, advantages_T, old_T, self.layout)


@dataclass(frozen=True)
class Sampling:
    """How rollouts are sampled."""

    max_tokens: int = 96
    """Longest completion; one that is cut there has no answer and earns nothing."""
    temperature: float = 1.0
    thinking_budget: int | None = None
    """Tokens of thinking after which a trace is ended; what that writes is not learned."""
    max_running: int = 256
    """Completions that are sampled side by side."""


def draw(names: Sequence[str], difficulties: Sequence[int], count: int, rng: random.Random) -> list[Problem]:
    """Training problems over the tasks in turn, of one difficulty: levels that are too easy or too hard teach nothing beside others."""
    difficulty = rng.choice(list(difficulties))
    chosen = [tasks.get(name) for name in names]
    return [chosen[index % len(chosen)].make(rng, difficulty, "train") for index in range(count)]


def sample(
    model: HybridLM,
    maker: ChatMaker,
    problems: Sequence[Problem],
    group: int,
    sampling: Sampling,
    seeds: random.Random,
) -> list[Rollout]:
    """`group` completions of each problem, group after group, each with a seed of its own."""
    repeated = [problem for problem in problems for _ in range(group)]
    prompts = [ids for problem in problems for ids in [maker.prompt(problem, thinking=True)] * group]
    each = [
        SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=seeds.getrandbits(63),
            thinking_budget=sampling.thinking_budget,
            logprobs=True,
        )
        for _ in prompts
    ]
    engine = Engine.sized_for(model, maker.tokenizer, prompts, sampling.max_tokens, sampling.max_running)
    completions = engine.generate(prompts, each)
    return [
        Rollout(problem, prompt, completion, reward(problem, completion))
        for problem, prompt, completion in zip(repeated, prompts, completions, strict=True)
    ]


def reward(problem: Problem, completion: Completion) -> float:
    """The task's verdict; nothing for a completion that did not end."""
    return (
        tasks.get(problem.family).verify(problem, completion.text)
        if completion.finish_reason == "stop"
        else 0.0
    )


def pack(rollouts: Sequence[Rollout], advantages: Sequence[float]) -> PolicyBatch:
    """Lay rollouts end to end. A completion's last token is not read: nothing follows it."""
    tokens: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    old: list[float] = []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        sampled, before = rollout.completion.token_ids, len(rollout.prompt) - 1
        tokens += rollout.prompt + sampled[:-1]
        targets += [IGNORED] * before + [
            IGNORED if at in rollout.completion.forced else token for at, token in enumerate(sampled)
        ]
        weights += [0.0] * before + [advantage] * len(sampled)
        old += [0.0] * before + list(rollout.completion.logprobs or [])
    layout = Layout.packed(
        [len(rollout.prompt) + len(rollout.completion.token_ids) - 1 for rollout in rollouts]
    )
    return PolicyBatch(
        torch.tensor(tokens), torch.tensor(targets), torch.tensor(weights), torch.tensor(old), layout
    )
