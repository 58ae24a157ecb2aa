"""The recipe of `compress`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanohybrid.compress.plan import grid_of
from nanohybrid.compress.post_training import AfterRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.successive_halving import RaceRecipe
from nanohybrid.config import HybridConfig
from nanohybrid.distill.stage import DistillRecipe
from nanohybrid.errors import ConfigError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import DTYPES, QUANTIZED, STEP, Budget
from nanohybrid.estimate.devices import device
from nanohybrid.evaluate.accuracy import check_problem_settings
from nanohybrid.export import TYPES
from nanohybrid.prune.measure import COSINE, ITERATIVE, ONE_SHOT
from nanohybrid.tasks import DEFAULT_MIX

ROOFLINE, MEASURED = "roofline", "measured"
"""How the speed of a shape is known."""


@dataclass(frozen=True)
class CompressRecipe:
    """How to make a model smaller."""

    budget_bytes: int | None = None
    """Memory for the model at work: weights, keys and values, states, and the activations of a step."""
    device: str | None = None
    """Whose memory is the budget where no bytes are given: a10g, l4, rtx4090, h100, h200 or cpu; and whose speed is estimated."""
    beside_bytes: int = 0
    """What else must fit on that device."""
    budget_share: float = 0.72
    """Where neither bytes nor a device are given: share of what the parent takes in `dtype`, activations aside."""
    context: int = 4096
    """Tokens of a sequence for which the budget must suffice."""
    batch: int = 1
    """Sequences at once."""
    dtype: str = "bf16"
    """Of the weights, keys and values at work: bf16, fp16 or fp32."""
    quantize: str | None = None
    """int8, int4 or fp8: what the matrices become at last. The budget is then for that form, and what is not a matrix stays bf16."""
    gguf: str | None = None
    """Also write the result as one file for llama.cpp: bf16, f16, f32, q8_0 or q4_0."""
    samples: int = 256
    """Calibration documents."""
    length: int = 512
    """Tokens of each, at most."""
    outgoing: bool = True
    """Multiply activations by the norm of the weights that read them."""
    layers_by: str = ITERATIVE
    """How layers are ranked where some may go: iterative (the paper's), one-shot, or cosine."""
    stream: bool | None = None
    """Read the models layer by layer to score and to try them, one layer in memory; none said: where they have no room whole."""
    speed: str = ROOFLINE
    """How tokens a second are known: roofline (of `device`, else of a CPU), or measured (layers timed on the device that is here)."""
    near: float = 0.01
    """Of the shapes whose quality is within this share of the best's, the fastest is chosen."""
    problems: int = 0
    """Held-out problems of each family that the model answers after every step; 0: it is asked none."""
    tasks: tuple[str, ...] = DEFAULT_MIX
    """Families of these problems."""
    grid: Grid = field(default_factory=Grid)
    race: RaceRecipe = field(default_factory=RaceRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    after: tuple[AfterRecipe, ...] = ()
    """Stages after distillation, each an sft, grpo, distill or merge, as [[after]] and [after.grpo] in TOML; none as it comes."""

    def __post_init__(self) -> None:
        if not 0 < self.budget_share <= 1:
            raise ConfigError(
                f"budget_share is {self.budget_share}: a share of the parent is above 0 and at most 1"
            )
        if self.dtype not in DTYPES:
            also = (
                f"; for {self.dtype} matrices give --quantize {self.dtype}" if self.dtype in QUANTIZED else ""
            )
            raise ConfigError(f"dtype is {self.dtype!r}: known are {', '.join(DTYPES)}{also}")
        if self.quantize is not None and (self.quantize not in QUANTIZED or self.dtype != "bf16"):
            raise ConfigError(
                f"quantize is {self.quantize!r} and dtype {self.dtype}: known are {', '.join(QUANTIZED)}, with dtype bf16"
            )
        if self.gguf is not None and self.gguf not in TYPES:
            raise ConfigError(f"gguf is {self.gguf!r}: known are {', '.join(TYPES)}")
        check_problem_settings(self.problems, self.tasks)
        if self.speed not in (ROOFLINE, MEASURED):
            raise ConfigError(f"speed is {self.speed!r}: known are {ROOFLINE} and {MEASURED}")
        if self.layers_by not in (ITERATIVE, ONE_SHOT, COSINE):
            raise ConfigError(
                f"layers_by is {self.layers_by!r}: known are {ITERATIVE}, {ONE_SHOT} and {COSINE}"
            )
        if not self.near >= 0:
            raise ConfigError(f"near is {self.near}: a share of the best quality is 0 or more")
        if self.device is not None and device(self.device).budget(self.beside_bytes) < 1:
            raise ConfigError(f"beside_bytes is {self.beside_bytes}: that leaves nothing of {self.device}")
        if self.after and self.after[0].kind == "merge":
            raise ConfigError(
                "after begins with merge, which joins the last two models: there must be a stage before it"
            )
        Budget(1 if self.budget_bytes is None else self.budget_bytes, self.context, self.batch, self.dtype)

    @property
    def form(self) -> str:
        """What the result's matrices are in: a format, else the dtype."""
        return self.quantize or self.dtype

    def budget(self, parent: HybridConfig) -> Budget:
        """The budget in bytes."""
        if self.budget_bytes is not None:
            return Budget(self.budget_bytes, self.context, self.batch, self.form, STEP)
        if self.device is not None:
            return Budget(
                device(self.device).budget(self.beside_bytes), self.context, self.batch, self.form, STEP
            )
        total = Footprint.of(parent, DTYPES[self.dtype]).total(self.context, self.batch)
        return Budget(int(total * self.budget_share), self.context, self.batch, self.form)

    def grid_for(self, parent: HybridConfig) -> Grid:
        """The recipe's grid; where it was left as it comes, the paper's for the paper's parent."""
        return grid_of(parent, self.grid) if self.grid == Grid() else self.grid
