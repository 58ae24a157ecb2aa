"""Is the memory model true, and how much does it take to score and to try a model layer by layer?

    python benchmarks/compress_memory.py                # the planned memory of a model, and its measured peak
    python benchmarks/compress_memory.py --streamed     # scores and a candidate, in memory and streamed

Each case is a process of its own, on a CPU. At work: random weights, keys, values and states for the whole
context, prepared as the engine does, a step of 2,048 tokens (or the whole context, where that is shorter),
one decode step. What is told is the peak of resident memory less what lay there before, when libraries and
kernels were loaded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanohybrid.checkpoint import CheckpointReader, load, save
from nanohybrid.compress.candidate_quality import QualityEvaluator
from nanohybrid.compress.search import pruned
from nanohybrid.config import HybridConfig
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import DTYPES, QUANTIZED, STEP, Budget
from nanohybrid.executors import executor_for
from nanohybrid.executors.cpu.weights import prepare
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.quantized import quantize_model
from nanohybrid.ops.sizes import PAGE
from nanohybrid.presets import preset
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.measure import importance_of
from nanohybrid.prune.target import Target

CASES = [
    ("nano-291m", 4096, 1, "fp32"), ("nano-291m", 4096, 1, "bf16"), ("nano-291m", 4096, 8, "bf16"), ("nano-291m", 4096, 1, "int8"),
    ("nano-291m", 4096, 1, "int4"), ("mini", 65_536, 4, "fp32"), ("mini", 65_536, 4, "bf16"), ("mini-dense", 65_536, 4, "fp32"),
    ("mini-dense", 65_536, 4, "bf16"), ("tiny", 4096, 64, "bf16"),
]  # fmt: skip
STREAMED = "nano-291m"
DOCUMENTS, LENGTH, ROUNDS = 2, 32, 2


def resident(row: str) -> int:
    """VmRSS, or VmHWM: the peak since `forget`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[row].split()[0])


def forget() -> int:
    """Begin a new peak here; bytes that lie there now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


@torch.inference_mode()
def work(name: str, context: int, batch: int, dtype: str) -> int:
    """Bytes that a model at inference adds to the peak of this process."""
    run(made(preset("tiny"), dtype), 64, 1)  # afterwards libraries and kernels are loaded
    before = forget()
    run(made(preset(name), dtype), context, batch)
    return resident("VmHWM") - before


def made(config: HybridConfig, dtype: str) -> HybridLM:
    """A model in this format, packed for the CPU kernels. No matrix but the one that is being packed is in
    memory twice."""
    kind = DTYPES["bf16" if dtype in QUANTIZED else dtype]
    torch.set_default_dtype(kind)
    with torch.device("meta"):
        model = HybridLM(config)
    torch.set_default_dtype(torch.float32)
    model = model.to(kind).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.fill_(0.01)
    if dtype in QUANTIZED:
        quantize_model(model, dtype)
        forget()  # a checkpoint that is quantized is read as codes
    prepare(model)
    return model


def run(model: HybridLM, context: int, batch: int) -> None:
    """A prefill step at the end of the first sequence's context, and a decode step of all sequences."""
    cache = HybridCache.for_context(model.config, batch, context, model.dtype)
    for layer in cache.layers:
        for tensor in layer.values():
            tensor.fill_(0.01)  # memory that is not written is not resident
    executor = executor_for(model, cache)
    tokens = min(STEP, context)
    layout = Layout.contiguous([tokens], [context - tokens], [0], context, PAGE)
    executor.run(torch.zeros(tokens, dtype=torch.int64), layout, [tokens - 1])
    layout = Layout.contiguous([1] * batch, [context - 1] * batch, range(batch), context, PAGE)
    executor.run(torch.zeros(batch, dtype=torch.int64), layout, range(batch))


def scored(model: Path, stream: bool) -> dict[str, Any]:
    """Peak of importance, an iterative ranking, and the loss of one shape; and the seconds of it."""
    with tempfile.TemporaryDirectory() as small:
        config = preset("tiny")
        save(HybridLM(config, seed=0), small)
        score(Path(small), stream, config.vocab_size)  # afterwards libraries and kernels are loaded
    before, began = forget(), time.monotonic()
    found = score(model, stream, 30_000)
    return {"peak_MiB": (resident("VmHWM") - before) / 2**20, "seconds": time.monotonic() - began, **found}


def score(model: Path, stream: bool, tokens: int) -> dict[str, Any]:
    """The layers that would go first, and the loss of a shape, on documents of `tokens` different tokens."""
    rng = np.random.default_rng(0)
    documents = tuple(
        (rng.integers(13, tokens, LENGTH).astype(np.int32), np.ones(LENGTH, np.uint8))
        for _ in range(DOCUMENTS)
    )
    calibration = Calibration(documents)
    with tempfile.TemporaryDirectory() as out, CheckpointReader(model) as reader, torch.inference_mode():
        parent = StreamedModel(reader) if stream else load(model, dtype=torch.float32)
        scores = importance_of(
            model if stream else parent, calibration, Path(out), True, ROUNDS, stream=stream
        )
        config = parent.config
        target = Target(
            layers=config.num_hidden_layers - 1,
            sizes={"intermediate_size": config.intermediate_size * 3 // 4},
        )
        loss = QualityEvaluator(parent, calibration)(pruned(parent, target.select(config, scores))).loss
    return {"order": list(scores.order[:ROUNDS]), "loss": loss}


def alone(*arguments: str) -> str:
    """What this program prints, run with these arguments in a process of its own."""
    return subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    ).stdout


def streamed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = preset(STREAMED)
        save(HybridLM(config, seed=0).to(torch.bfloat16), folder)
        print(
            f"{STREAMED}: {4 * Footprint.of(config).parameters / 2**20:,.0f} MiB in fp32, "
            f"{DOCUMENTS} x {LENGTH} tokens, {ROUNDS} rounds"
        )
        for form in ("in memory", "streamed"):
            print(form, alone("--scored", folder, form), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--streamed", action="store_true", help="scores and losses instead of a model at work"
    )
    parser.add_argument("--case", nargs=4, help="one case, in this process: preset, context, batch, dtype")
    parser.add_argument(
        "--scored", nargs=2, help="one measurement of --streamed, in this process: a checkpoint, and how"
    )
    arguments = parser.parse_args()
    if arguments.scored:
        print(json.dumps(scored(Path(arguments.scored[0]), arguments.scored[1] == "streamed")))
    elif arguments.case:
        name, context, batch, dtype = arguments.case
        print(work(name, int(context), int(batch), dtype))
    elif arguments.streamed:
        streamed()
    else:
        plans()


def plans() -> None:
    for name, context, batch, dtype in CASES:
        case = [name, str(context), str(batch), dtype]
        found = int(alone("--case", *case))
        memory = Budget(2**40, context, batch, dtype, STEP).memory(preset(name))
        parts = {name: round(part / 2**20, 1) for name, part in memory.as_dict().items()}
        row = {
            "case": " ".join(case),
            **parts,
            "measured": round(found / 2**20, 1),
            "measured/plan": round(found / memory.total, 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
