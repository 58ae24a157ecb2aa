"""The recipe of `compress`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nanohybrid.compress.plan import grid_of
from nanohybrid.compress.post_training import PostTrainingRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.successive_halving import SuccessiveHalvingRecipe
from nanohybrid.config import HybridConfig
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import DTYPES, QUANTIZED, STEP, Budget
from nanohybrid.estimate.devices import device
from nanohybrid.evaluate.accuracy import check_problem_settings
from nanohybrid.export import TYPES
from nanohybrid.prune.depth_units import AUTO, depth_units
from nanohybrid.prune.measure import ITERATIVE, PER_PARAMETER, DepthRanking
from nanohybrid.tasks import DEFAULT_MIX

ROOFLINE, MEASURED = "roofline", "measured"
"""How the speed of a shape is estimated."""


@dataclass(frozen=True)
class CompressRecipe:
    """How to make a model smaller. Raises ConfigError where fields contradict one another."""

    budget_bytes: int | None = None
    """Memory for the model at inference: weights, KV cache, recurrent states, and the activations of a
    step."""
    device: str | None = None
    """The device that the result is for: a10g, l4, rtx4090, h100, h200 or cpu. Its memory is the budget where
    no bytes are given, and its speed is estimated."""
    reserved_bytes: int = 0
    """Memory of that device that the model may not use."""
    budget_share: float = 0.72
    """Without bytes and without a device: the share of the base model's memory in `dtype`, activations not
    counted."""
    context: int = 4096
    """Tokens of a sequence that must fit the budget."""
    batch: int = 1
    """Sequences at once that must fit."""
    dtype: str = "bf16"
    """Of weights and KV cache at inference: bf16, fp16 or fp32."""
    quantize: str | None = None
    """int8, int4 or fp8: the format of the matrices at the end. The budget is for that format; the rest stays
    bf16."""
    quantize_head: bool = False
    """Quantize an untied head too: smaller, but vLLM and SGLang read it in few formats (docs/quantize.md)."""
    gguf: str | None = None
    """Also write the result as one file for llama.cpp: bf16, f16, f32, q8_0 or q4_0."""
    num_calibration_samples: int = 256
    """At most so many calibration documents."""
    max_calibration_length: int = 512
    """At most so many tokens of each."""
    scale_by_outgoing_norm: bool = True
    """Multiply activations by the norm of the weights that read them."""
    depth_importance: str = ITERATIVE
    """How layers are ranked where some may go: iterative (as in the paper), one-shot, or cosine."""
    depth_unit: str = AUTO
    """What goes as one: block (attention and MLP), layer, or auto: blocks where the model's type knows only
    blocks (llama, mistral, qwen3)."""
    depth_score: str = PER_PARAMETER
    """Rank by the change of the logits for each `parameter` that goes, or for each `layer` (the paper's)."""
    depth_tokens: int | None = None
    """Calibration tokens of one round of the ranking. Not set: as many as take about a minute."""
    stream: bool | None = None
    """Read models layer by layer to score and to evaluate them, with one layer in memory. Not set: where they
    do not fit."""
    speed: str = ROOFLINE
    """How speed is estimated: roofline (of `device`, else of a CPU), or measured (layers timed on this
    machine)."""
    quality_tolerance: float = 0.01
    """Of the candidates whose quality is within this share of the best one's, the fastest is selected."""
    problems: int = 0
    """Held-out problems of each task on which the model is evaluated after every step; 0: none."""
    tasks: tuple[str, ...] = DEFAULT_MIX
    """The tasks of these problems."""
    grid: Grid = field(default_factory=Grid)
    successive_halving: SuccessiveHalvingRecipe = field(default_factory=SuccessiveHalvingRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    post_training: tuple[PostTrainingRecipe, ...] = ()
    """Stages after distillation, each an sft, grpo, distill or merge, in TOML as [[post_training]] and
    [post_training.grpo]."""

    RENAMED: ClassVar[dict[str, str]] = {
        "beside_bytes": "reserved_bytes",
        "samples": "num_calibration_samples",
        "length": "max_calibration_length",
        "outgoing": "scale_by_outgoing_norm",
        "layers_by": "depth_importance",
        "near": "quality_tolerance",
        "race": "successive_halving",
        "after": "post_training",
    }

    def __post_init__(self) -> None:
        if not 0 < self.budget_share <= 1:
            raise ConfigError(
                f"budget_share is {self.budget_share}: give a share of the base model above 0 and at most 1"
            )
        if self.dtype not in DTYPES:
            also = (
                f"; for {self.dtype} matrices give --quantize {self.dtype}" if self.dtype in QUANTIZED else ""
            )
            raise ConfigError(f"dtype is {self.dtype!r}: known are {', '.join(DTYPES)}{also}")
        if self.quantize is not None and (self.quantize not in QUANTIZED or self.dtype != "bf16"):
            raise ConfigError(
                f"quantize is {self.quantize!r} and dtype {self.dtype}: known are "
                f"{', '.join(QUANTIZED)}, with dtype bf16"
            )
        if self.gguf is not None and self.gguf not in TYPES:
            raise ConfigError(f"gguf is {self.gguf!r}: known are {', '.join(TYPES)}")
        check_problem_settings(self.problems, self.tasks)
        if self.speed not in (ROOFLINE, MEASURED):
            raise ConfigError(f"speed is {self.speed!r}: known are {ROOFLINE} and {MEASURED}")
        _ = self.depth  # checks its names
        if not self.quality_tolerance >= 0:
            raise ConfigError(f"quality_tolerance is {self.quality_tolerance}: give a share of 0 or more")
        if self.device is not None and device(self.device).budget(self.reserved_bytes) < 1:
            raise ConfigError(
                f"reserved_bytes is {self.reserved_bytes}: that leaves no memory of {self.device}"
            )
        if self.post_training and self.post_training[0].kind == "merge":
            raise ConfigError(
                "post_training begins with merge, which joins the last two models: there must be a "
                "stage before it"
            )
        Budget(1 if self.budget_bytes is None else self.budget_bytes, self.context, self.batch, self.dtype)

    @property
    def weight_format(self) -> str:
        """What the result's matrices are in: a quantized format, else the dtype."""
        return self.quantize or self.dtype

    @property
    def depth(self) -> DepthRanking:
        """How layers are ranked."""
        return DepthRanking(self.depth_importance, self.depth_unit, self.depth_score, self.depth_tokens)

    def budget(self, base: HybridConfig) -> Budget:
        """The budget for a model pruned from `base`."""
        shape = (self.context, self.batch, self.weight_format)
        if self.budget_bytes is not None:
            return Budget(self.budget_bytes, *shape, STEP, self.quantize_head)
        if self.device is not None:
            left = device(self.device).budget(self.reserved_bytes)
            return Budget(left, *shape, STEP, self.quantize_head)
        total = Footprint.of(base, DTYPES[self.dtype]).total(self.context, self.batch)
        return Budget(int(total * self.budget_share), *shape, quantize_head=self.quantize_head)

    def grid_for(self, base: HybridConfig) -> Grid:
        """The recipe's grid; where it is the default one, the paper's for the paper's base model.

        Raises InputError where it drops half a block of a model that loses whole ones.
        """
        grid = grid_of(base, self.grid) if self.grid == Grid() else self.grid
        size = depth_units(base, self.depth_unit).size
        for layers in grid.drop_layers:
            if layers % size:
                raise InputError(
                    f"grid.drop_layers names {layers}: this model loses whole blocks of {size} layers, so "
                    f'that other programs read it; give multiples of {size}, or depth_unit = "layer"'
                )
        return grid
