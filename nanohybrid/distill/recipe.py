"""The recipe of `distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nanohybrid.distill.hidden_state_loss import HiddenStateLossRecipe
from nanohybrid.distill.teacher import BESIDE, PLACES
from nanohybrid.errors import ConfigError
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig


@dataclass(frozen=True)
class SequenceLengthStep:
    """One step of a schedule: up to a share of the training steps, sequences of at most a length."""

    until: float
    sequence_length: int


@dataclass(frozen=True)
class DistillRecipe:
    """How a student learns from its teacher. Raises ConfigError where fields contradict one another."""

    tokens: int = 500_000
    """Tokens to train on."""
    batch_tokens: int = 2048
    sequence_length: int = 512
    temperature: float = 1.0
    """Softens both distributions."""
    post_training_share: float = 0.7
    """Share of tokens from post-training documents, where pretraining documents are given too."""
    train_on_prompt: bool = False
    """Learn from the teacher on every token, and not only where a document has targets."""
    sequence_length_schedule: tuple[SequenceLengthStep, ...] = ()
    """Sequence lengths in turn, as in the paper (8,192, then 49,152, then 262,144). Empty: `sequence_length`
    throughout."""
    teacher: str = BESIDE
    """Where the teacher is: beside (in memory, fp32), int8, fp8 or int4 (in memory, quantized), or offloaded
    (read layer by layer at every step)."""
    top_k: int = 0
    """Run the teacher first, store its so many most probable tokens and the mass of the rest, and learn from
    these. 0: all."""
    hidden_state_loss: HiddenStateLossRecipe = field(default_factory=HiddenStateLossRecipe)
    """A loss on hidden states beside the one on the logits; off by default."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=5e-4))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    measured_tokens: int = 16_384
    """Tokens on which the divergence from the teacher is measured before and after."""
    seed: int = 0

    RENAMED: ClassVar[dict[str, str]] = {
        "post_training": "post_training_share",
        "every_token": "train_on_prompt",
        "stretches": "sequence_length_schedule",
        "between": "hidden_state_loss",
    }

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch_tokens, self.sequence_length, self.measured_tokens) < 1:
            raise ConfigError("tokens, batch_tokens, sequence_length and measured_tokens must be positive")
        if self.teacher not in PLACES:
            raise ConfigError(f"teacher is {self.teacher!r}: known are {', '.join(PLACES)}")
        if self.top_k < 0:
            raise ConfigError(
                f"top_k is {self.top_k}: give the number of tokens to store, or 0 for the whole distribution"
            )
        if self.top_k and self.hidden_state_loss.weight:
            raise ConfigError(
                "top_k stores the teacher's most probable tokens and not its hidden states: give top_k or "
                "hidden_state_loss.weight, not both"
            )
        ends = [step.until for step in self.sequence_length_schedule]
        if ends and (ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1.0):
            raise ConfigError(
                f"sequence_length_schedule ends at {ends}: give rising shares of the steps, the last 1.0"
            )
        if self.temperature <= 0 or not 0 < self.post_training_share <= 1:
            raise ConfigError("temperature must be above 0, and post_training_share above 0 and at most 1")

    @property
    def steps(self) -> int:
        """Training steps of the run."""
        return -(-self.tokens // self.batch_tokens)
