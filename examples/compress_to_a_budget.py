"""Make a model smaller until it fits a memory budget: score, search, prune, distill; the result and a report.

    python examples/compress_to_a_budget.py runs/quickstart/3-align 8       # a checkpoint, and GiB
    python examples/compress_to_a_budget.py   # random weights, three quarters of their memory

The command is `nanohybrid compress MODEL --budget-gib G --out DIR`; `nanohybrid plan compress` says first
what would fit."""

import json
import sys
import tempfile
from pathlib import Path

import nanohybrid
from nanohybrid.compress import CompressRecipe, DistillRecipe, compress
from nanohybrid.engine.random_weights import stand_in_tokenizer
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.units import GIB


def make_model(directory: Path) -> Path:
    """A checkpoint of random weights with a tokenizer."""
    config = nanohybrid.preset("tiny")
    nanohybrid.save(nanohybrid.HybridLM(config, seed=0), directory)
    stand_in_tokenizer(config).save(directory)
    return directory


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # What counts is the model at work: weights, KV cache and states of one sequence of 4,096 tokens
        if len(sys.argv) > 2:
            model, out = Path(sys.argv[1]), Path("runs/compressed")
            recipe = CompressRecipe(budget_bytes=int(float(sys.argv[2]) * GIB), context=4096)
        else:
            model, out = make_model(Path(scratch) / "model"), Path(scratch) / "compressed"
            recipe = CompressRecipe(  # little of everything: the example ends in seconds
                budget_share=0.75,
                context=4096,
                num_calibration_samples=16,
                max_calibration_length=128,
                distill=DistillRecipe(tokens=4_096),
            )
        compress(recipe, model, None, out)

        before, after = nanohybrid.load_config(model), nanohybrid.load_config(out)
        for name in ("pattern", "hidden_size", "intermediate_size", "mamba_head_dim"):
            print(f"{name:20} {getattr(before, name)} -> {getattr(after, name)}")
        budget, taken = recipe.budget(before).bytes, Footprint.of(after).total(context=4096)
        print(f"{taken:,} of {budget:,} bytes of the budget; the report is {out / 'report.html'}")
        steps = json.loads((out / "lineage.json").read_text())["measures"]["losses"]
        print("loss:", ", ".join(f"{step} {loss:.3f}" for step, loss in steps.items()))


if __name__ == "__main__":
    main()
