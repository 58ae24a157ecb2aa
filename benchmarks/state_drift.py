"""How far states stored in 16 bits drift from fp32 over a long text, in the recurrent steps that write an
answer.

    python benchmarks/state_drift.py runs/quickstart/4-compress --tokens 4096
    python benchmarks/state_drift.py --preset nano-291m --tokens 4096

Every variant reads the same tokens (drawn by the fp32 model), one step each; only what is stored between
steps differs: SSM states in fp16 rounded stochastically (nanohybrid's fp16), in fp16 and in bf16 rounded to
nearest, or keys and values in FP8. Prints, at powers of two: the relative error of all SSM states (norm of
the difference over norm), and of the logits since the line before (largest difference over the largest
logit)."""

import argparse
import sys
from pathlib import Path

import torch

from nanohybrid.checkpoint import load
from nanohybrid.engine.random_weights import random_model
from nanohybrid.model import HybridCache, Layout
from nanohybrid.presets import preset

VARIANTS = ("fp16 stochastic", "fp16 nearest", "bf16 nearest", "keys and values fp8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--preset")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    config = preset(arguments.preset) if arguments.preset else None
    model = random_model(config, torch.float32, 0) if config else load(arguments.path, dtype=torch.float32)
    total = arguments.tokens
    states = {"fp32": HybridCache.for_context(model.config, 1, total + 1)}
    for variant in VARIANTS:
        pages = states["fp32"].pages
        stored = torch.float16 if variant == "fp16 stochastic" else None
        eight = torch.float8_e4m3fn if variant == "keys and values fp8" else None
        states[variant] = HybridCache.allocate(model.config, 1, pages, state_dtype=stored, kv_dtype=eight)
    generator = torch.Generator().manual_seed(arguments.seed)
    token = torch.tensor([model.config.bos_token_id])
    print("| tokens | " + " | ".join(f"{name}: state | logits" for name in VARIANTS) + " |")
    errors = dict.fromkeys(VARIANTS, 0.0)
    with torch.inference_mode():
        for position in range(total):
            logits = {}
            for name, state in states.items():
                pages = [range(state.pages)]
                layout = Layout.with_cache([1], [position], [0], pages, seeds=[arguments.seed])
                logits[name] = model.head(model.hidden(token, layout, state))[0]
                if name in ("fp16 nearest", "bf16 nearest"):
                    narrow = torch.float16 if name.startswith("fp16") else torch.bfloat16
                    for pools in state.layers:
                        if "ssm" in pools:
                            pools["ssm"].copy_(pools["ssm"].to(narrow).float())
            for name in VARIANTS:
                error = (logits[name] - logits["fp32"]).abs().max() / logits["fp32"].abs().max()
                errors[name] = max(errors[name], float(error))
            if (position + 1) & position == 0 and position >= 15:
                cells = [
                    f"{_distance(states[name], states['fp32']):.1e} | {errors[name]:.1e}" for name in VARIANTS
                ]
                print(f"| {position + 1} | " + " | ".join(cells) + " |", flush=True)
                errors = dict.fromkeys(VARIANTS, 0.0)
            token = torch.multinomial(logits["fp32"].softmax(-1), 1, generator=generator)
    return 0


def _distance(state: HybridCache, exact: HybridCache) -> float:
    pairs = [
        (a["ssm"].double(), b["ssm"].double())
        for a, b in zip(state.layers, exact.layers, strict=True)
        if "ssm" in a
    ]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
