"""Measuring importance as a step of a stage: activations in one pass, layers by skipping them, stored in a
file.

The file is found again by what it was measured on, so a resumed or repeated command does not measure twice. A
checkpoint is read layer by layer. Only the iterative ranking of layers, which reads it once for each layer
that goes, loads it where it fits the memory.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanohybrid.checkpoint import CheckpointReader, load
from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.estimate import Footprint
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import format_in
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.depth_importance import LayerRanking, rank_layers, rank_layers_streamed
from nanohybrid.prune.depth_units import AUTO, DEPTH_UNITS, LAYER, DepthUnits, depth_units
from nanohybrid.prune.importance import FILE, Importance
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.streaming import should_stream
from nanohybrid.stages import progress

ITERATIVE, ONE_SHOT, COSINE = "iterative", "one-shot", "cosine"
DEPTH_IMPORTANCE = (ITERATIVE, ONE_SHOT, COSINE)
PER_LAYER, PER_PARAMETER = "layer", "parameter"
DEPTH_SCORES = (PER_LAYER, PER_PARAMETER)
ROUND_FLOPS = {"cpu": 1e13, "cuda": 1e16}
"""What a round of the ranking may take where the number of its tokens is not given: about a minute."""
LEAST_DEPTH_TOKENS = 256


@dataclass(frozen=True)
class DepthRanking:
    """How layers are ranked. Raises ConfigError for unknown names.

    importance: iterative (each after the one before it was removed), one-shot (each alone), or cosine (no
    further pass). unit: auto, block or layer (depth_units.py). score: the change of the logits for each
    layer, or for each parameter, that goes. tokens: calibration tokens of a round; None: as many as a round
    computes in about a minute (ROUND_FLOPS).
    """

    importance: str = ITERATIVE
    unit: str = AUTO
    score: str = PER_LAYER
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("depth_importance", self.importance, DEPTH_IMPORTANCE),
            ("depth_unit", self.unit, DEPTH_UNITS),
            ("depth_score", self.score, DEPTH_SCORES),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}: known are {', '.join(known)}")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"depth_tokens is {self.tokens}: give a positive number")

    def calibration(self, config: HybridConfig, calibration: Calibration, device: str) -> Calibration:
        """The documents of a round, evenly spaced over all that are given; says so where they are fewer."""
        tokens = self.tokens
        if tokens is None:
            each = Footprint.of(config).parameters * len(depth_units(config, self.unit).layers)
            budget = ROUND_FLOPS["cuda" if str(device).startswith("cuda") else "cpu"]
            tokens = max(LEAST_DEPTH_TOKENS, int(budget / each))
        found = calibration.spread(tokens)
        if found.tokens < calibration.tokens and self.importance != COSINE:
            print(
                f"nanohybrid: layers are ranked on {found.tokens:,} of {calibration.tokens:,} calibration "
                "tokens (depth_tokens)",
                file=sys.stderr,
            )
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What a file of scores says of its ranking."""
        return {
            "depth_importance": self.importance,
            "depth_unit": self.unit,
            "depth_score": self.score,
            "depth_tokens": self.tokens,
        }


def importance_of(
    model: HybridLM | Path,
    calibration: Calibration,
    directory: Path,
    scale_by_outgoing_norm: bool,
    rounds: int | None,
    depth: DepthRanking | None = None,
    stream: bool | None = None,
    device: str = "cpu",
) -> Importance:
    """The scores of `model`, read from `directory` where they were measured before, else measured and written
    there.

    model: in memory, or a checkpoint directory. scale_by_outgoing_norm: as in activations.py. rounds: how
    many layers may go; None leaves layers unranked. depth: how layers are ranked. stream: whether a
    checkpoint is read layer by layer to rank iteratively; None: where it does not fit the memory. device:
    where a checkpoint is measured.

    Raises InputError for a quantized model.
    """
    if isinstance(model, HybridLM) and (found_format := format_in(model)) is not None:
        raise InputError(
            f"the model is quantized ({found_format}): take the checkpoint that it was made from"
        )
    depth = depth or DepthRanking()
    if (directory / FILE).exists():
        found = Importance.load(directory / FILE)
        same = (
            found.facts.get("calibration") == calibration.hash
            and found.facts.get("scale_by_outgoing_norm") == scale_by_outgoing_norm
        )
        facts = {**_OLD_FACTS, **found.facts}
        ranked = rounds is None or (
            all(facts[name] == value for name, value in depth.facts.items())
            and facts.get("rounds", -1) >= rounds
        )
        if same and ranked:
            return found
    how = calibration, scale_by_outgoing_norm, rounds, depth, device
    if isinstance(model, Path) and (
        rounds is None or depth.importance != ITERATIVE or should_stream(model, stream, device)
    ):
        with CheckpointReader(model) as reader:
            scores = _measure(StreamedModel(reader, device=device), *how)
    else:
        scores = _measure(load(model, torch.float32, device) if isinstance(model, Path) else model, *how)
    scores.save(directory)
    return scores


_OLD_FACTS = {**DepthRanking(unit=LAYER).facts}  # of files that say nothing of their ranking


def _measure(
    model: HybridLM | StreamedModel,
    calibration: Calibration,
    scale_by_outgoing_norm: bool,
    rounds: int | None,
    depth: DepthRanking,
    device: str,
) -> Importance:
    with progress("importance", calibration.tokens * model.config.num_hidden_layers, "tok") as bar:
        scores = measure_activations(model, calibration, scale_by_outgoing_norm, advance=bar.advance)
    if rounds is None:
        return scores
    units = depth_units(model.config, depth.unit)
    facts = {**depth.facts, "unit_layers": units.size}
    if depth.importance == COSINE:
        cosine_U = [float(scores.cosine[list(layers)].sum()) for layers in units.layers]
        cost = units.parameters if depth.score == PER_PARAMETER else (1,) * len(cosine_U)
        places = sorted(range(len(cosine_U)), key=lambda unit: (cosine_U[unit] / cost[unit], unit))
        order = [layer for unit in places for layer in units.layers[unit]]
        return scores.with_layers(scores.cosine.clone(), order, rounds, **facts)
    part = depth.calibration(model.config, calibration, device)
    searched = -(-rounds // units.size) if depth.importance == ITERATIVE else 0
    ranking = _rank(model, part, searched, units, depth.score == PER_PARAMETER)
    return scores.with_layers(
        ranking.score_L, ranking.order, rounds, **facts, depth_calibration_tokens=part.tokens
    )


def _rank(
    model: HybridLM | StreamedModel,
    calibration: Calibration,
    rounds: int,
    units: DepthUnits,
    per_parameter: bool,
) -> LayerRanking:
    """Layers by the change of the logits."""
    if isinstance(model, HybridLM):
        with progress("layers", max(1, rounds), "rounds") as bar:
            return rank_layers(
                model, calibration, rounds, advance=bar.advance, units=units, per_parameter=per_parameter
            )
    work = max(1, rounds) * calibration.tokens * model.config.num_hidden_layers
    with progress("layers", work, "tok") as bar:
        return rank_layers_streamed(
            model, calibration, rounds, advance=bar.advance, units=units, per_parameter=per_parameter
        )
