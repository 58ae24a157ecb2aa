"""GRPO: reinforcement learning from verifiable rewards, on completions that the model samples itself (paper,
section 3).

A rollout step samples `prompts` x `num_generations` completions with the engine, scores them with the
verifiers of the tasks, compares them within groups (objective.py) and trains for `steps_per_generation`
optimizer steps, each on its own minibatch of whole groups. With one such step the probability ratio is 1 and
clipping has no effect; with more, the old log-probabilities are those of the engine. The training loop is
`fit`, as in the other stages: a batch depends on the weights and the step.

Known causes of collapse (docs/align.md): no warmup, a ten times higher learning rate, tasks that are solved
always or never.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from nanohybrid import tasks
from nanohybrid.align.chats import ChatMaker
from nanohybrid.align.objective import advantages, policy_loss
from nanohybrid.align.rollouts import (
    PolicyBatch,
    Rollout,
    SamplingConfig,
    draw_problems,
    pack_rollouts,
    sample_completions,
)
from nanohybrid.checkpoint import cast_as_stored, load, refuse_quantized, resolve, save
from nanohybrid.errors import ConfigError
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import IGNORED, chunked_log_probs
from nanohybrid.stages import Stage, open_stage
from nanohybrid.text import ChatTemplate, Tokenizer
from nanohybrid.train import (
    LoopConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    fit,
    training_state,
)

SERIES = "rollouts"


@dataclass(frozen=True)
class GrpoRecipe:
    """GRPO on verifiable rewards."""

    RENAMED: ClassVar[dict[str, str]] = {
        "rollouts": "rollout_steps",
        "group": "num_generations",
        "updates": "steps_per_generation",
        "by_deviation": "scale_rewards",
        "clip_low": "epsilon",
        "clip_high": "epsilon_high",
        "warmup_updates": "warmup_steps",
        "held_out": "eval_problems",
    }

    tasks: tuple[str, ...] = ("assignments", "running")
    """Families of problems. Those that the model solves in 50 to 80 % of its tries teach most."""
    difficulties: tuple[int, ...] = (5, 6)
    """Difficulties of the problems; each rollout step draws one."""
    rollout_steps: int = 40
    """Number of times to sample, score and train."""
    prompts: int = 32
    """Problems of a rollout step."""
    num_generations: int = 8
    """Completions of each problem, which are compared with each other (the group size)."""
    steps_per_generation: int = 1
    """Optimizer steps of a rollout step, each on its own part of the groups."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scale_rewards: bool = True
    """Divide advantages by the standard deviation of the rewards in their group."""
    epsilon: float = 0.2
    """Lower clipping range: probability ratios count from 1 - epsilon."""
    epsilon_high: float = 0.28
    """Upper clipping range: probability ratios count up to 1 + epsilon_high."""
    beta: float = 0.0
    """Weight of the KL divergence from the initial model; 0 loads no reference model."""
    warmup_steps: int = 10
    """Optimizer steps until the full learning rate. Training collapses without warmup."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)
    )
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig(mode="fp32"))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_steps=1))
    eval_problems: int = 512
    """Held-out problems for the sampled accuracy before and after training."""
    seed: int = 0
    """Seed of problems and completions."""

    def __post_init__(self) -> None:
        if (
            min(self.rollout_steps, self.prompts, self.steps_per_generation, self.eval_problems) < 1
            or self.num_generations < 2
            or not self.tasks
            or not self.difficulties
        ):
            raise ConfigError(
                "rollout_steps, prompts, steps_per_generation and eval_problems must be positive, "
                "num_generations at least 2, "
                "tasks and difficulties not empty"
            )
        if self.prompts % self.steps_per_generation:
            raise ConfigError(
                f"prompts is {self.prompts}; it must be a multiple of steps_per_generation, which is "
                f"{self.steps_per_generation}"
            )
        if self.sampling.temperature <= 0:
            raise ConfigError(
                "sampling.temperature must be positive, because the completions of a group must differ"
            )

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.rollout_steps * self.steps_per_generation

    @property
    def schedule(self) -> ScheduleConfig:
        """Linear warmup, then a constant learning rate."""
        return ScheduleConfig(warmup=min(1.0, self.warmup_steps / self.steps), decay=0.0)


def grpo(recipe: GrpoRecipe, model: Path, out: Path, device: str = "cpu") -> Path:
    """Train the checkpoint `model` on the recipe's tasks and write it to `out`, which is returned.

    The device holds the policy, the reference model and the engine. Raises InputError for a quantized
    checkpoint.
    """
    model = resolve(model)
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
            RolloutLoader(policy, maker, recipe, stage).batch,
            GrpoLoss(recipe, load(model, torch.float32, device) if recipe.beta else None),
            recipe,
            steps=recipe.steps,
            stage=stage,
            steps_per_unit=recipe.steps_per_generation,
            name="grpo",
        )
        cast_as_stored(policy, model)
        policy.float()  # what is evaluated has the rounding of what is saved
        stage.measure(accuracy_after=sampled_accuracy(policy, maker, recipe))
        cast_as_stored(policy, model)
        save(policy, stage.directory, assets=model)
        training_state.remove(stage.directory)
    return out


class RolloutLoader:
    """The batches of `fit`. It samples with the current weights, once in `steps_per_generation` steps."""

    def __init__(self, policy: HybridLM, maker: ChatMaker, recipe: GrpoRecipe, stage: Stage) -> None:
        self.policy, self.maker, self.recipe, self.stage = policy, maker, recipe, stage
        self.minibatches: list[PolicyBatch] = []
        self.log_is_rewound = False

    def batch(self, step: int) -> PolicyBatch:
        """The minibatch of an optimizer step."""
        rollout_step, index = divmod(step, self.recipe.steps_per_generation)
        if not self.log_is_rewound:
            self.stage.rewind(SERIES, step=rollout_step + 1)
            self.log_is_rewound = True
        if index == 0:
            self.minibatches = self.sample(rollout_step)
        return self.minibatches[index]

    def sample(self, rollout_step: int) -> list[PolicyBatch]:
        """Sample and score completions, compute advantages, and split into minibatches of whole groups."""
        recipe = self.recipe
        rng = random.Random(f"grpo/{recipe.seed}/{rollout_step}")
        problems = draw_problems(recipe.tasks, recipe.difficulties, recipe.prompts, rng)
        rollouts = sample_completions(
            self.policy, self.maker, problems, recipe.num_generations, recipe.sampling, rng
        )
        weights = advantages(
            torch.tensor([rollout.reward for rollout in rollouts]),
            recipe.num_generations,
            recipe.scale_rewards,
        ).tolist()
        self.log(rollout_step, rollouts, weights)
        size = len(rollouts) // recipe.steps_per_generation
        return [
            pack_rollouts(rollouts[at : at + size], weights[at : at + size])
            for at in range(0, len(rollouts), size)
        ]

    def log(self, rollout_step: int, rollouts: list[Rollout], weights: list[float]) -> None:
        """Log accuracy, mean length in tokens, and the shares of completions that were cut off or have an
        advantage."""
        count = len(rollouts)
        self.stage.log(
            SERIES,
            step=rollout_step + 1,
            accuracy=sum(rollout.reward for rollout in rollouts) / count,
            mean_length=sum(len(rollout.completion.token_ids) for rollout in rollouts) / count,
            clipped_ratio=sum(rollout.completion.finish_reason == "length" for rollout in rollouts) / count,
            nonzero_advantage_ratio=sum(weight != 0 for weight in weights) / count,
        )


class GrpoLoss:
    """The loss of `fit`: (policy, batch) -> its sum over sampled tokens, and their number."""

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
            batch.old_log_probs_T[sampled_T],
            batch.advantages_T[sampled_T],
            self.recipe.epsilon,
            self.recipe.epsilon_high,
            self.recipe.beta,
            reference_T,
        )
        return loss_T.sum(), batch.target_count

    def log_probs(self, model: HybridLM, batch: PolicyBatch) -> Tensor:
        """Log-probability [T] of each target at the sampling temperature."""
        hidden_TE = model.hidden(batch.tokens_T, batch.layout) / self.recipe.sampling.temperature
        return chunked_log_probs(hidden_TE, model.head_weight, batch.targets_T)


def sampled_accuracy(policy: HybridLM, maker: ChatMaker, recipe: GrpoRecipe) -> float:
    """Share of held-out problems solved with the sampling of training.

    With 512 of them its standard error is two points.
    """
    rng = random.Random(f"held out/{recipe.seed}")
    levels = [(tasks.get(name), difficulty) for name in recipe.tasks for difficulty in recipe.difficulties]
    problems = [
        task.make(rng, level, "test")
        for task, level in (levels[index % len(levels)] for index in range(recipe.eval_problems))
    ]
    rollouts = sample_completions(policy, maker, problems, 1, recipe.sampling, rng)
    return sum(rollout.reward for rollout in rollouts) / max(len(rollouts), 1)
