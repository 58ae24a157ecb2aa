"""Is the memory model true? What a plan says a model takes at work, beside what a process that does that work takes at its peak.

    python benchmarks/compress_memory.py

Each case is a process of its own: random weights, keys, values and states for the whole context, a step of 2,048 tokens (or the whole
context, where that is shorter), one decode step. Its peak of resident memory, less what the libraries took before, stands beside the
plan's parts. On a CPU.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch

from nanohybrid.compress.budget import STEP, Budget
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM, Layout, State
from nanohybrid.ops.sizes import PAGE

CASES = [("nano-291m", 4096, 1, "fp32"), ("nano-291m", 4096, 1, "bf16"), ("mini", 65_536, 4, "fp32"), ("mini-dense", 65_536, 4, "fp32")]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.inference_mode()
def work(preset: str, context: int, batch: int, dtype: str) -> int:
    """Bytes that a model's work adds to the peak of this process."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    run(HybridLM(HybridConfig.preset("tiny")).to(kind).eval(), 64, 1)  # what the libraries take is there after this
    before = peak()
    torch.set_default_dtype(kind)  # no copy of the weights in another dtype
    model = HybridLM(HybridConfig.preset(preset)).to(kind).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.fill_(0.01)
    run(model, context, batch)
    return peak() - before


def run(model: HybridLM, context: int, batch: int) -> None:
    """A step of many tokens of the first sequence, at the end of its context, and a decode step of all."""
    state = State.for_context(model.config, batch, context, model.head_weight.dtype)
    for pools in state.layers:
        for pool in pools.values():
            pool.fill_(0.01)  # what is not written is not resident
    tokens = min(STEP, context)
    layout = Layout.contiguous([tokens], [context - tokens], [0], context, PAGE)
    model.head(model.hidden(torch.zeros(tokens, dtype=torch.int64), layout, state)[-1:])
    layout = Layout.contiguous([1] * batch, [context - 1] * batch, range(batch), context, PAGE)
    model.head(model.hidden(torch.zeros(batch, dtype=torch.int64), layout, state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=4, help="one case, in this process: preset, context, batch, dtype")
    arguments = parser.parse_args()
    if arguments.case:
        preset, context, batch, dtype = arguments.case
        print(work(preset, int(context), int(batch), dtype))
        return
    for preset, context, batch, dtype in CASES:
        case = [preset, str(context), str(batch), dtype]
        found = int(subprocess.run([sys.executable, __file__, "--case", *case], check=True, capture_output=True, text=True).stdout)
        memory = Budget(2**40, context, batch, dtype, STEP).memory(HybridConfig.preset(preset))
        parts = {name: round(part / 2**20, 1) for name, part in memory.as_dict().items()}
        row = {"case": " ".join(case), **parts, "measured": round(found / 2**20, 1), "measured/plan": round(found / memory.total, 3)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
