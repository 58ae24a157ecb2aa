"""What an evaluation does, as a value. No torch is needed to read it."""

from __future__ import annotations

from dataclasses import dataclass

from nanohybrid.errors import ConfigError
from nanohybrid.tasks import DEFAULT_MIX


@dataclass(frozen=True)
class Mode:
    """How problems are answered: with thinking, within a budget or not; greedily at temperature 0."""

    thinking: bool = True
    budget: int | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    grace: int = 500
    seed: int = 0


@dataclass(frozen=True)
class EvaluateRecipe:
    """What is measured of each model."""

    tasks: tuple[str, ...] = DEFAULT_MIX
    """Families of problems; their test splits are used."""
    problems: int = 120
    """Problems of each family."""
    budgets: tuple[int, ...] = (0, 8, 16, 24, 32, 48, 64)
    """Thinking budgets of the curve; none for no curve."""
    curve_models: tuple[str, ...] = ()
    """Models whose curve is drawn; none means the first."""
    max_tokens: int = 192
    """Tokens of a completion, its trace included."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    grace: int = 500
    """Tokens after a budget at which a trace ends at the latest."""
    contexts: tuple[int, ...] = (64, 1024, 4096, 16384)
    """Contexts at which a decode step is timed; none for no timing."""
    decode_models: tuple[str, ...] = ()
    """Models that are timed; none means all."""
    decode_batch: int = 16
    """Sequences of the timed step."""
    decode_rounds: int = 9
    """Timed steps of each model and context; the median counts."""
    held_out_tokens: int = 65_536
    """Tokens of held-out documents on which the loss is measured, where there are any."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.problems, self.max_tokens, self.decode_batch, self.decode_rounds, self.held_out_tokens)
            < 1
        ):
            raise ConfigError(
                "problems, max_tokens, decode_batch, decode_rounds and held_out_tokens must be positive"
            )
        if any(budget < 0 for budget in self.budgets) or any(context < 1 for context in self.contexts):
            raise ConfigError("budgets must not be negative, and contexts must be positive")
        if not (0 <= self.temperature < float("inf") and 0 < self.top_p <= 1 and self.grace >= 0):
            raise ConfigError("temperature and grace must be 0 or more, and top_p above 0 and at most 1")

    def mode(self, thinking: bool, budget: int | None = None) -> Mode:
        """The mode of this recipe with thinking on, off or within a budget."""
        return Mode(
            thinking, budget, self.max_tokens, self.temperature, self.top_p, self.grace, self.seed * 1_000_003
        )
