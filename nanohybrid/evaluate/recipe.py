"""The recipe of an evaluation. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nanohybrid.errors import ConfigError
from nanohybrid.tasks import DEFAULT_MIX


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling of answers. Temperature 0 is greedy; `thinking_budget=None` is no budget."""

    thinking: bool = True
    thinking_budget: int | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    thinking_grace: int = 500
    seed: int = 0


@dataclass(frozen=True)
class EvaluateRecipe:
    """Evaluation of one or more models."""

    RENAMED: ClassVar[dict[str, str]] = {"budgets": "thinking_budgets", "grace": "thinking_grace"}

    tasks: tuple[str, ...] = DEFAULT_MIX
    """Families of problems; problems come from their test splits."""
    problems: int = 120
    """Problems of each family."""
    thinking_budgets: tuple[int, ...] = (0, 8, 16, 24, 32, 48, 64)
    """Thinking budgets, in tokens, of the accuracy-vs-budget curve; empty for no curve."""
    curve_models: tuple[str, ...] = ()
    """Names of the models with a curve; empty for the first model."""
    max_tokens: int = 192
    """Longest completion, in tokens, thinking included."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling."""
    thinking_grace: int = 500
    """Tokens after the budget within which a trace must end."""
    contexts: tuple[int, ...] = (64, 1024, 4096, 16384)
    """Context lengths, in tokens, at which a decode step is timed; empty for no timing."""
    decode_models: tuple[str, ...] = ()
    """Names of the models to time; empty for all."""
    decode_batch: int = 16
    """Batch size of the timed decode step."""
    decode_rounds: int = 9
    """Timed steps of each model and context; the report shows the median."""
    held_out_tokens: int = 65_536
    """Tokens of held-out documents for the loss, where --data is given."""
    seed: int = 0
    """Seed of problems and sampling."""

    def __post_init__(self) -> None:
        if (
            min(self.problems, self.max_tokens, self.decode_batch, self.decode_rounds, self.held_out_tokens)
            < 1
        ):
            raise ConfigError(
                "problems, max_tokens, decode_batch, decode_rounds and held_out_tokens must be positive"
            )
        if any(budget < 0 for budget in self.thinking_budgets) or any(
            context < 1 for context in self.contexts
        ):
            raise ConfigError("thinking_budgets must not be negative, and contexts must be positive")
        if not (0 <= self.temperature < float("inf") and 0 < self.top_p <= 1 and self.thinking_grace >= 0):
            raise ConfigError(
                "temperature and thinking_grace must be 0 or more, and top_p above 0 and at most 1"
            )

    def generation(self, thinking: bool, thinking_budget: int | None = None) -> GenerationConfig:
        """The sampling of this recipe, with thinking on, off or within a budget."""
        return GenerationConfig(
            thinking,
            thinking_budget,
            self.max_tokens,
            self.temperature,
            self.top_p,
            self.thinking_grace,
            self.seed * 1_000_003,
        )
