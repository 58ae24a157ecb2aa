"""GRPO: reinforcement learning from verifiable rewards, on completions the model samples itself.

A rollout of `prompts` x `group` completions is sampled by the engine, rewarded by the tasks' verifiers, compared within groups
(objective.py) and learned in `updates` steps. With one update the ratio is 1 and the clip is idle; with more, old log-probabilities
are the engine's. The loop is the same `fit` as everywhere: a batch is a function of the weights and the step.

What is known to collapse (docs/align.md): no warm-up, a learning rate ten times this one, a task that is solved or hopeless.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid import tasks
from nanohybrid.align.chats import ChatMaker
from nanohybrid.align.objective import advantages, policy_loss
from nanohybrid.align.rollouts import PolicyBatch, Rollout, Sampling, draw, pack, sample
from nanohybrid.checkpoint import load, refuse_quantized, save
from nanohybrid.errors import ConfigError
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import IGNORED, chunked_log_probs
from nanohybrid.stages import Stage, open_stage
from nanohybrid.text import ChatTemplate, Tokenizer
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig, fit, training_state

SERIES = "rollouts"


@dataclass(frozen=True)
class GrpoRecipe:
    """How to improve an aligned model by verifiable rewards."""

    tasks: tuple[str, ...] = ("assignments", "running")
    """Families to draw from; those that the model solves in half to four fifths of its tries teach most."""
    difficulties: tuple[int, ...] = (5, 6)
    """Levels; each rollout takes one of them."""
    rollouts: int = 40
    """How often to sample, score and learn."""
    prompts: int = 32
    """Problems of a rollout."""
    group: int = 8
    """Completions of each problem, compared with each other."""
    updates: int = 1
    """Optimizer steps for each rollout, every one on its own part of the groups."""
    sampling: Sampling = field(default_factory=Sampling)
    by_deviation: bool = True
    """Divide advantages by the deviation of their group."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """How far below and above 1 the probability ratio still counts."""
    beta: float = 0.0
    """Weight of the KL divergence from the model at the start; 0 needs no second model."""
    warmup_updates: int = 10
    """Steps until the full learning rate. Without them training collapses."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)
    )
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig(mode="fp32"))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_steps=1))
    held_out: int = 512
    """Held-out problems on which sampled accuracy is measured before and after."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.rollouts, self.prompts, self.updates, self.held_out) < 1
            or self.group < 2
            or not self.tasks
            or not self.difficulties
        ):
            raise ConfigError(
                "rollouts, prompts, updates and held_out must be positive, group at least 2, tasks and difficulties not empty"
            )
        if self.prompts % self.updates:
            raise ConfigError(
                f"prompts {self.prompts} cannot be shared by {self.updates} updates: take a multiple"
            )
        if self.sampling.temperature <= 0:
            raise ConfigError("sampling.temperature must be positive: completions of a group must differ")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.rollouts * self.updates

    @property
    def schedule(self) -> ScheduleConfig:
        """A warm-up, then the full learning rate to the end."""
        return ScheduleConfig(warmup=min(1.0, self.warmup_updates / self.steps), decay=0.0)


def grpo(recipe: GrpoRecipe, model: Path, out: Path, device: str = "cpu") -> Path:
    """Improve the checkpoint `model` on the recipe's tasks. device: where it samples and learns, and where its reference is."""
    refuse_quantized(model)
    with open_stage(out, "grpo", recipe, {"model": model}, recipe.seed, device) as stage:
        if stage.complete:
            return out
        policy = load(model, torch.float32, device)
        maker = ChatMaker(Tokenizer.from_directory(model), ChatTemplate.from_directory(model))
        if "accuracy_before" not in stage.measures:
            stage.measure(accuracy_before=sampled_accuracy(policy, maker, recipe))
        fit(
            policy,
            Rollouts(policy, maker, recipe, stage).batch,
            Objective(recipe, load(model, torch.float32, device) if recipe.beta else None),
            recipe,
            steps=recipe.steps,
            stage=stage,
            steps_per_unit=recipe.updates,
            name="grpo",
        )
        stage.measure(accuracy_after=sampled_accuracy(policy, maker, recipe))
        save(policy, stage.directory, assets=model)
        training_state.remove(stage.directory)
    return out


class Rollouts:
    """Gives `fit` its batches: samples with the weights as they are now, once for each `updates` steps."""

    def __init__(self, policy: HybridLM, maker: ChatMaker, recipe: GrpoRecipe, stage: Stage) -> None:
        self.policy, self.maker, self.recipe, self.stage = policy, maker, recipe, stage
        self.parts: list[PolicyBatch] = []
        self.begun = False

    def batch(self, step: int) -> PolicyBatch:
        """The part of a rollout that a step learns from."""
        number, part = divmod(step, self.recipe.updates)
        if not self.begun:
            self.stage.rewind(SERIES, step=number + 1)
            self.begun = True
        if part == 0:
            self.parts = self.sample(number)
        return self.parts[part]

    def sample(self, number: int) -> list[PolicyBatch]:
        """Sample, score, compare within groups, and cut into parts of whole groups."""
        recipe = self.recipe
        rng = random.Random(f"grpo/{recipe.seed}/{number}")
        problems = draw(recipe.tasks, recipe.difficulties, recipe.prompts, rng)
        rollouts = sample(self.policy, self.maker, problems, recipe.group, recipe.sampling, rng)
        weights = advantages(
            torch.tensor([rollout.reward for rollout in rollouts]), recipe.group, recipe.by_deviation
        ).tolist()
        self.log(number, rollouts, weights)
        size = len(rollouts) // recipe.updates
        return [
            pack(rollouts[at : at + size], weights[at : at + size]) for at in range(0, len(rollouts), size)
        ]

    def log(self, number: int, rollouts: list[Rollout], weights: list[float]) -> None:
        """Write down how the policy does on what it has just sampled."""
        count = len(rollouts)
        self.stage.log(
            SERIES,
            step=number + 1,
            accuracy=sum(rollout.reward for rollout in rollouts) / count,
            tokens=sum(len(rollout.completion.token_ids) for rollout in rollouts) / count,
            cut_off=sum(rollout.completion.finish_reason == "length" for rollout in rollouts) / count,
            informative=sum(weight != 0 for weight in weights) / count,
        )


class Objective:
    """The loss of a batch of rollouts for `fit`: its sum over sampled tokens, and their number."""

    def __init__(self, recipe: GrpoRecipe, reference: HybridLM | None) -> None:
        self.recipe, self.reference = recipe, reference

    def __call__(self, policy: HybridLM, batch: PolicyBatch) -> tuple[Tensor, int]:
        sampled_T = batch.targets_T != IGNORED
        reference_T = None
        if self.reference is not None:
            with torch.no_grad():
                reference_T = self.log_probs(self.reference, batch)[sampled_T]
        loss_T = policy_loss(
            self.log_probs(policy, batch)[sampled_T],
            batch.old_T[sampled_T],
            batch.advantages_T[sampled_T],
            self.recipe.clip_low,
            self.recipe.clip_high,
            self.recipe.beta,
            reference_T,
        )
        return loss_T.sum(), batch.target_count

    def log_probs(self, model: HybridLM, batch: PolicyBatch) -> Tensor:
        """Log-probability of each sampled token in the distribution it was sampled from."""
        hidden_TE = model.hidden(batch.tokens_T, batch.layout) / self.recipe.sampling.temperature
        return chunked_log_probs(hidden_TE, model.head_weight, batch.targets_T)


def sampled_accuracy(policy: HybridLM, maker: ChatMaker, recipe: GrpoRecipe) -> float:
    """Share of held-out problems solved when sampling as in training; 512 of them have an error of two points."""
    rng = random.Random(f"held out/{recipe.seed}")
    levels = [(tasks.get(name), difficulty) for name in recipe.tasks for difficulty in recipe.difficulties]
    problems = [
        task.make(rng, level, "test")
        for task, level in (levels[index % len(levels)] for index in range(recipe.held_out))
    ]
    rollouts = sample(policy, maker, problems, 1, recipe.sampling, rng)
    return sum(rollout.reward for rollout in rollouts) / max(len(rollouts), 1)
