"""The stage `quantize`: a checkpoint in, the same with its matrices in 8 or 4 bits out, with a report of what
that changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nanohybrid.checkpoint import CheckpointReader, refuse_quantized, resolve
from nanohybrid.data import TokenStore
from nanohybrid.errors import ConfigError
from nanohybrid.evaluate.accuracy import check_can_answer, check_problem_settings, measure_accuracy
from nanohybrid.extras import require
from nanohybrid.model.quantized import check_format
from nanohybrid.prune.calibration import Calibration
from nanohybrid.quantize.layerwise import Quantization, quantize_checkpoint
from nanohybrid.quantize.report import quantize_report
from nanohybrid.stages import open_stage, progress
from nanohybrid.tasks import DEFAULT_MIX


@dataclass(frozen=True)
class QuantizeRecipe:
    """The format, and how the result is measured. Raises ConfigError for values out of range."""

    format: str = "int8"
    """int8, int4 or fp8."""
    quantize_head: bool = False
    """Quantize an untied head too. vLLM and SGLang read a quantized head in few formats, so it stays as it is
    by default."""
    num_calibration_samples: int = 128
    """At most so many documents, where some are given. int4 chooses its scales on every other one and is
    evaluated on the rest."""
    max_calibration_length: int = 512
    """At most so many tokens of each."""
    problems: int = 0
    """Held-out problems of each task on which both models are evaluated; 0: none."""
    tasks: tuple[str, ...] = DEFAULT_MIX
    """The tasks of these problems."""

    RENAMED: ClassVar[dict[str, str]] = {
        "samples": "num_calibration_samples",
        "length": "max_calibration_length",
    }

    def __post_init__(self) -> None:
        check_format(self.format)
        if self.num_calibration_samples < 1 or self.max_calibration_length < 2:
            raise ConfigError(
                f"num_calibration_samples is {self.num_calibration_samples} and max_calibration_length "
                f"{self.max_calibration_length}: at least 1 document and 2 tokens are needed"
            )
        check_problem_settings(self.problems, self.tasks)


def quantize_stage(
    recipe: QuantizeRecipe, model: Path, out: Path, documents: Path | None = None, device: str = "cpu"
) -> Path:
    """Quantize the checkpoint `model` into `out`, and compare both on `documents` and by the recipe's
    problems. Returns `out`.

    documents: as in `Calibration.read`. device: where the matrices are quantized and both models compared.
    Raises InputError for a quantized model.
    """
    if documents is not None or recipe.problems:
        require("matplotlib", "train")  # for the report
    model = resolve(model)
    refuse_quantized(model, "it can be quantized no further; take the one that it was made from")
    if recipe.problems:
        check_can_answer(recipe.tasks, model, device)
    with CheckpointReader(model) as reader:
        tensors, vocab_size = len(reader.names()), reader.config.vocab_size
    inputs = {"model": model} | ({"documents": documents} if documents is not None else {})
    with open_stage(out, "quantize", recipe, inputs, device=device) as stage:
        if stage.complete:
            return out
        samples = None
        if documents is not None:
            samples = Calibration.read(
                documents, model, recipe.num_calibration_samples, recipe.max_calibration_length
            )
            TokenStore.from_documents(samples.samples).check_ids(vocab_size, documents)
        with progress("quantize", tensors, "tensors") as bar:
            found = quantize_checkpoint(
                model, recipe.format, stage.directory, samples, bar.advance, device, recipe.quantize_head
            )
        both = {"before": model, recipe.format: stage.directory}
        answers = measure_accuracy(recipe.problems, recipe.tasks, 0, both, stage, device)
        stage.measure(**measures(found), **({"accuracy": answers} if answers else {}))
        if samples is not None:
            stage.spend(tokens=samples.tokens)
        if samples is not None or answers:
            quantize_report(found, model, answers).write(stage.directory / "report.html")
    return out


def measures(found: Quantization) -> dict[str, Any]:
    """The measures of a quantization, for `lineage.json` and `--json`."""
    errors = list(found.errors.values())
    result: dict[str, Any] = {
        "format": found.format,
        "bytes_before": sum(found.bytes_before.values()),
        "bytes_after": sum(found.bytes_after.values()),
        "bytes_by_kind": {
            kind: [count, found.bytes_after[kind]] for kind, count in found.bytes_before.items()
        },
        "weight_error": math.sqrt(sum(error**2 for error in errors) / max(len(errors), 1)),
        "not_quantized": found.unquantized,
    }
    if found.quality is not None:
        quality = found.quality
        result |= {
            "perplexity_before": math.exp(min(quality.loss_before, 700.0)),
            "perplexity_after": math.exp(min(quality.loss_after, 700.0)),
            "perplexity_change": math.expm1(quality.loss_after - quality.loss_before),
            "top1_agreement": quality.agreement,
            "kl_divergence": quality.divergence,
            "targets": quality.targets,
        }
    return result
