"""The recipes of the quickstart: the tiny recipes, scaled by one factor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from nanohybrid.align.grpo import GrpoRecipe
from nanohybrid.align.sft import SftRecipe
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.data.recipe import DataRecipe
from nanohybrid.errors import InputError
from nanohybrid.evaluate.recipe import EvaluateRecipe
from nanohybrid.stages.recipe import load
from nanohybrid.train.pretrain import PretrainRecipe

# scale from which the model is larger; below it, the tiny model learns more from the additional tokens
MINI_FROM = 4.0
SHORT_RUN_SHARE = 0.3  # tokens of each run of the FP8 comparison, as a share of the tokens of pretraining

R = TypeVar("R")


@dataclass(frozen=True)
class Recipes:
    """The recipes of one run."""

    data: DataRecipe
    pretrain: PretrainRecipe
    short_bf16: PretrainRecipe
    short_fp8: PretrainRecipe
    sft: SftRecipe
    grpo: GrpoRecipe
    compress: CompressRecipe
    dense: PretrainRecipe
    evaluate: EvaluateRecipe

    @classmethod
    def of(cls, scale: float, seed: int) -> Recipes:
        """The tiny recipes with tokens, problems and rollout steps multiplied by `scale`.

        Raises InputError for a bad scale.
        """
        if not 0 < scale <= 1000:
            raise InputError(
                f"--scale is {scale}; it must be above 0 and at most 1000; 1 takes about 15 minutes"
            )
        size = "mini" if scale >= MINI_FROM else "tiny"
        data = read(DataRecipe, "data", seed)
        data = dataclasses.replace(data, tasks=tuple(times(source, scale, "count") for source in data.tasks))
        data = times(data, scale, "code_megabytes", "prose_megabytes") if scale < 1 else data
        pretrain = dataclasses.replace(
            times(read(PretrainRecipe, "pretrain", seed), scale, "tokens"), model=size
        )
        fp8 = read(PretrainRecipe, "pretrain-fp8", seed)
        short = times(pretrain, SHORT_RUN_SHARE, "tokens")
        compress = read(CompressRecipe, "compress", None)
        distill = dataclasses.replace(times(compress.distill, scale, "tokens"), seed=seed)
        evaluate = dataclasses.replace(
            read(EvaluateRecipe, "evaluate", seed),
            curve_models=("parent",),
            decode_models=("parent", "transformer"),
        )
        return cls(
            data=data,
            pretrain=pretrain,
            short_bf16=short,
            short_fp8=dataclasses.replace(short, precision=fp8.precision),
            sft=times(read(SftRecipe, "sft", seed), scale, "tokens"),
            grpo=times(read(GrpoRecipe, "grpo", seed), scale, "rollout_steps"),
            compress=dataclasses.replace(compress, distill=distill),
            dense=dataclasses.replace(pretrain, model=f"{size}-dense"),
            evaluate=times(evaluate, min(scale, 1.0), "problems"),
        )


def read(kind: type[R], name: str, seed: int | None) -> R:
    """A tiny recipe by file name, with the seed of this run."""
    with resources.as_file(resources.files("nanohybrid").joinpath(f"recipes/tiny/{name}.toml")) as path:
        recipe = load(kind, Path(path))
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)  # type: ignore[type-var]


def times(recipe: R, scale: float, *fields: str) -> R:
    """A recipe with some fields multiplied by `scale`; integers are rounded, to at least 1."""
    changes: dict[str, Any] = {}
    for field in fields:
        value = getattr(recipe, field)
        changes[field] = max(1, round(value * scale)) if isinstance(value, int) else value * scale
    return dataclasses.replace(recipe, **changes)  # type: ignore[type-var]
