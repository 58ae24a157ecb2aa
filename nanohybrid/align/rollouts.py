"""Rollouts: completions that the policy samples, their rewards, and the batch that GRPO trains on.

Rollouts depend on (weights, seed, step) alone. Problems come from a random generator of the step, each
completion has its own seed, and a completion does not depend on the others in its batch. A resumed run
therefore samples the same completions.

T tokens of the batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    """One completion of a problem and its reward."""

    problem: Problem
    prompt: list[int]
    completion: Completion
    reward: float


@dataclass(frozen=True)
class PolicyBatch:
    """Prompts with their completions, laid end to end.

    tokens_T         int64 ids
    targets_T        int64: the sampled token that follows, or -100 where no token was sampled
    advantages_T     fp32, at the targets; 0 elsewhere
    old_log_probs_T  fp32, of the targets when they were sampled; 0 elsewhere
    """

    tokens_T: Tensor
    targets_T: Tensor
    advantages_T: Tensor
    old_log_probs_T: Tensor
    layout: Layout

    @property
    def target_count(self) -> int:
        """Number of sampled tokens."""
        return int((self.targets_T != IGNORED).sum())

    def to(self, device: torch.device) -> "PolicyBatch":
        """The same batch on a device."""
        tokens_T, targets_T, advantages_T, old_log_probs_T = (
            tensor.to(device)
            for tensor in (self.tokens_T, self.targets_T, self.advantages_T, self.old_log_probs_T)
        )
        return PolicyBatch(tokens_T, targets_T, advantages_T, old_log_probs_T, self.layout)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of completions."""

    RENAMED: ClassVar[dict[str, str]] = {"max_running": "max_num_seqs"}

    max_tokens: int = 96
    """Longest completion, in tokens; one that reaches it has reward 0."""
    temperature: float = 1.0
    """Sampling temperature."""
    thinking_budget: int | None = None
    """Thinking tokens after which the engine ends the trace; the tokens that it inserts have no loss."""
    max_num_seqs: int = 256
    """Completions that are sampled at once."""


def draw_problems(
    names: Sequence[str], difficulties: Sequence[int], count: int, rng: random.Random
) -> list[Problem]:
    """`count` training problems, the tasks in turn, all of one random difficulty.

    One difficulty at a time, because groups of problems that are too easy or too hard have advantage 0.
    """
    difficulty = rng.choice(list(difficulties))
    chosen = [tasks.get(name) for name in names]
    return [chosen[index % len(chosen)].make(rng, difficulty, "train") for index in range(count)]


def sample_completions(
    model: HybridLM,
    maker: ChatMaker,
    problems: Sequence[Problem],
    num_generations: int,
    sampling: SamplingConfig,
    rng: random.Random,
) -> list[Rollout]:
    """`num_generations` completions of each problem, group after group.

    `rng` draws a seed for each completion.
    """
    repeated = [problem for problem in problems for _ in range(num_generations)]
    prompts = [
        ids for problem in problems for ids in [maker.prompt(problem, thinking=True)] * num_generations
    ]
    params = [
        SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=rng.getrandbits(63),
            thinking_budget=sampling.thinking_budget,
            logprobs=True,
        )
        for _ in prompts
    ]
    engine = Engine.sized_for(
        model, maker.tokenizer, prompts, sampling.max_tokens, max_num_seqs=sampling.max_num_seqs
    )
    completions = engine.generate(prompts, params)
    return [
        Rollout(problem, prompt, completion, reward(problem, completion))
        for problem, prompt, completion in zip(repeated, prompts, completions, strict=True)
    ]


def reward(problem: Problem, completion: Completion) -> float:
    """The score of the task's verifier, from 0 to 1; 0 for a completion that did not stop by itself."""
    return (
        tasks.get(problem.family).verify(problem, completion.text)
        if completion.finish_reason == "stop"
        else 0.0
    )


def pack_rollouts(rollouts: Sequence[Rollout], advantages: Sequence[float]) -> PolicyBatch:
    """Lay rollouts end to end. The last token of a completion is a target only, since no token follows it."""
    tokens: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    old_log_probs: list[float] = []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        sampled, before = rollout.completion.token_ids, len(rollout.prompt) - 1
        tokens += rollout.prompt + sampled[:-1]
        targets += [IGNORED] * before + [
            IGNORED if at in rollout.completion.forced else token for at, token in enumerate(sampled)
        ]
        weights += [0.0] * before + [advantage] * len(sampled)
        old_log_probs += [0.0] * before + list(rollout.completion.logprobs or [])
    layout = Layout.packed(
        [len(rollout.prompt) + len(rollout.completion.token_ids) - 1 for rollout in rollouts]
    )
    return PolicyBatch(
        torch.tensor(tokens),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(old_log_probs),
        layout,
    )
