"""The latency table: how long a decode step takes on this machine, from times of single layers.

The time of a layer in a decode step is that of reading its matrices. So for each kind of layer a few shapes
of the grid are timed, spread over the bytes of their matrices, and times between them are interpolated
linearly in bytes; likewise the head. A layer's time is the difference between a model of three such layers
and one of one, timed in turns, so that everything else in a model cancels out.

The table is a file in the user's cache. Each time is written as it is measured, so a kill loses one, and the
next run on this machine measures nothing. The file name identifies everything that a time depends on
(`conditions`): the device and its threads, the kernels, the versions of the project and of torch, the source
text of `ops`, `model` and `executors`, the dtype, context and batch, and the fields of the model that no
pruning changes. Where one of these differs another file is used, so outdated times are measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.budget import QUANTIZED, Budget
from nanohybrid.estimate.linear_shapes import matrices_of
from nanohybrid.evaluate.throughput import decode_times
from nanohybrid.executors.cpu.weights import prepare
from nanohybrid.files import atomic_write
from nanohybrid.model import HybridLM
from nanohybrid.model.mixers import MIXERS
from nanohybrid.model.quantized import quantize_model
from nanohybrid.ops.numba import available
from nanohybrid.prune.prunable import known_axes
from nanohybrid.version import VERSION

POINTS = 4
"""Shapes of each kind that are timed."""
HEAD = "head"
SMALL_VOCABULARY = 64
"""Entries of a vocabulary whose head takes no time."""
Timer = Callable[[dict[str, HybridConfig]], dict[str, float]]


@dataclass
class LatencyTable:
    """Times of layers in seconds, by kind and by bytes of the layer's matrices, stored in `file`."""

    file: Path
    budget: Budget
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls, budget: Budget, device: torch.device, model: HybridConfig, folder: Path | None = None
    ) -> LatencyTable:
        """The table of this device for shapes pruned from `model`, with the times measured before under the
        same conditions."""
        facts = conditions(budget, device, model)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        file = (
            folder or cache_folder()
        ) / f"{facts['device']}-{budget.dtype}-context{budget.context}-batch{budget.batch}-{key}.json"
        return cls(file, budget, cls.read(file) if file.is_file() else {}, facts)

    @staticmethod
    def read(file: Path) -> dict[str, dict[int, float]]:
        """The times in a file. Raises InputError where it has none."""
        try:
            rows = json.loads(file.read_text())["seconds"]
            return {
                kind: {int(count): float(time) for count, time in row.items()} for kind, row in rows.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: not a table of layers' times ({error}); remove it, and they are measured again"
            ) from None

    def measure(
        self, shapes: Iterable[HybridConfig], timer: Timer, advance: Callable[[int], object] | None = None
    ) -> None:
        """Time the layers that the shapes need and the table lacks. A table that spans their sizes already is
        not changed."""
        for kind, row in sizes_to_time(shapes).items():
            known = self.times.setdefault(kind, {})
            if not (known and min(known) <= min(row) and max(row) <= max(known)):
                for size in spread(sorted(row), POINTS):
                    if size not in known:
                        known[size] = time_of(kind, row[size], timer)
                        self.save()
            if advance is not None:
                advance(1)

    def save(self) -> None:
        rows = {
            kind: {str(size): row[size] for size in sorted(row)} for kind, row in sorted(self.times.items())
        }
        atomic_write(self.file, json.dumps({"conditions": self.conditions, "seconds": rows}, indent=2) + "\n")

    def seconds(self, config: HybridConfig) -> float:
        """One decode step of a model of this shape, by interpolation."""
        head = interpolate(self.times[HEAD], head_bytes(config))
        return head + sum(
            config.pattern.count(kind) * interpolate(self.times[kind], layer_bytes(config, kind))
            for kind in set(config.pattern)
        )

    def tokens_per_second(self, config: HybridConfig) -> float:
        """Of all sequences together."""
        return self.budget.batch / max(self.seconds(config), 1e-9)


def sizes_to_time(shapes: Iterable[HybridConfig]) -> dict[str, dict[int, HybridConfig]]:
    """For each kind of layer and the head, by the bytes of its matrices, a shape that has such a layer."""
    table: dict[str, dict[int, HybridConfig]] = {}
    for config in shapes:
        table.setdefault(HEAD, {}).setdefault(head_bytes(config), config)
        for kind in sorted(set(config.pattern)):
            table.setdefault(kind, {}).setdefault(layer_bytes(config, kind), config)
    return table


def time_of(kind: str, config: HybridConfig, timer: Timer) -> float:
    """Seconds that one layer, or the head, adds to a decode step."""
    if kind == HEAD:
        least = min(config.pattern)  # one layer of any kind; it is in both models and cancels out
        pair = {
            "with": config.replace(pattern=least),
            "without": config.replace(pattern=least, vocab_size=SMALL_VOCABULARY),
        }
        found = timer({name: shape.replace(tie_word_embeddings=False) for name, shape in pair.items()})
        return max(found["with"] - found["without"], 0.0)
    found = timer(
        {str(count): config.replace(pattern=kind * count, vocab_size=SMALL_VOCABULARY) for count in (1, 3)}
    )
    return max(found["3"] - found["1"], 0.0) / 2


def decode_timer(budget: Budget, device: torch.device, rounds: int = 15) -> Timer:
    """Seconds of a decode step of each of several models with random weights, in turns: the quickest of
    `rounds`."""

    def timer(shapes: dict[str, HybridConfig]) -> dict[str, float]:
        models = {name: HybridLM(config).to(device, budget.kind).eval() for name, config in shapes.items()}
        for model in models.values():
            model.reset_parameters(0)
            if budget.dtype in QUANTIZED:
                quantize_model(model, budget.dtype, quantize_head=budget.quantize_head)
            prepare(model)  # for the kernels that the engine uses
        found = decode_times(models, [budget.context], budget.batch, rounds)
        return {name: rows[0].quickest / 1e3 for name, rows in found.items()}

    return timer


def layer_bytes(config: HybridConfig, kind: str) -> int:
    """Bytes of the matrices of one layer in bf16; the unit of size for every dtype."""
    return 2 * sum(rows * columns for rows, columns in matrices_of(MIXERS[kind], config))


def head_bytes(config: HybridConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def interpolate(times: dict[int, float], size: int) -> float:
    """A time at `size`: linear between the two nearest measured sizes; beyond them in proportion to size."""
    sizes = sorted(times)
    place = bisect_left(sizes, size)
    if place == 0:
        return times[sizes[0]] * size / sizes[0]
    if place == len(sizes):
        return times[sizes[-1]] * size / sizes[-1]
    low, high = sizes[place - 1], sizes[place]
    share = (size - low) / (high - low)
    return times[low] * (1 - share) + times[high] * share


def spread(sizes: list[int], count: int) -> list[int]:
    """`count` of the sizes, the smallest and the largest among them, evenly between."""
    last = max(len(sizes) - 1, 0)
    return list(dict.fromkeys(sizes[round(number * last / max(count - 1, 1))] for number in range(count)))


def conditions(budget: Budget, device: torch.device, model: HybridConfig) -> dict[str, str]:
    """Everything that a time depends on beside the bytes of a layer, as text."""
    forced = os.environ.get("NANOHYBRID_KERNELS", "")
    kernels = forced or (
        "packed" if device.type == "cpu" and available() else "fastest"
    )  # on a CPU `prepare` packs where numba is installed
    pruned = {"pattern", *known_axes()}  # what a grid changes
    fixed = {name: value for name, value in model.as_dict().items() if name not in pruned}
    return {
        "device": device_name(device),
        "kernels": kernels,
        "version": VERSION,
        "torch": torch.__version__,
        "code": code_hash(),
        "work": f"{budget.dtype}, context {budget.context}, batch {budget.batch}"
        + ("" if budget.quantize_head else ", plain head"),
        "model": hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()[:12],
    }


@cache
def code_hash() -> str:
    """A hash of the source text that runs in a step, which changes more often than the version."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for file in sorted(
        file for folder in ("ops", "model", "executors") for file in (package / folder).rglob("*.py")
    ):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def device_name(device: torch.device) -> str:
    """A name for files: the GPU's, or the processor's with the number of threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.is_file() else []
        name = (
            next((line.partition(":")[2] for line in lines if line.startswith("model name")), "cpu")
            + f" {torch.get_num_threads()} threads"
        )
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def cache_folder() -> Path:
    """The folder of this user's tables."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanohybrid" / "latency"
