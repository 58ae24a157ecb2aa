"""Train a hybrid of half a million parameters on problems with worked solutions, and ask it one.

    python examples/train_a_tiny_model.py            # 60 steps, half a minute on two cores
    python examples/train_a_tiny_model.py 1500       # ten minutes: it then solves most of them

The loop is the one of every training stage (docs/train.md); recipes and commands add data, schedules and
checkpoints."""

import random
import sys
import tempfile
from pathlib import Path

import nanohybrid
from nanohybrid import HybridLM, SamplingParams
from nanohybrid.data import Batch
from nanohybrid.engine import Engine
from nanohybrid.engine.random_weights import stand_in_tokenizer
from nanohybrid.stages import open_stage
from nanohybrid.tasks.registry import get
from nanohybrid.train import fit, next_token_loss
from nanohybrid.train.pretrain import PretrainRecipe

BATCH = 24


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    config = nanohybrid.preset("tiny")
    tokenizer, task = stand_in_tokenizer(config), get("parity")

    def batch(step: int) -> Batch:
        """The documents of a step, a function of its number: (ids, which of them are learned)."""
        rng = random.Random(step)
        problems = [task.make(rng, rng.choice(range(4, 8))) for _ in range(BATCH)]
        texts = [f"{p.prompt}\n{p.trace}\n={p.answer}\n" for p in problems]
        return Batch.of((ids, [1] * len(ids)) for ids in map(tokenizer.encode, texts))

    model = HybridLM(config, seed=0)
    recipe = PretrainRecipe(model="tiny", steps=steps)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        with open_stage(out, "pretrain", recipe, {}, recipe.seed) as stage:
            fit(model, batch, next_token_loss, recipe, steps=steps, stage=stage)
        nanohybrid.save(model.eval(), out / "checkpoint")
        model = nanohybrid.load(out / "checkpoint")

    problem = task.make(random.Random(-1), 5, split="test")
    prompt = tokenizer.encode(problem.prompt + "\n")
    engine = Engine.sized_for(model, tokenizer, [prompt], 48)
    text = engine.generate([prompt], SamplingParams(max_tokens=48, temperature=0.0, stop=("\n\n",)))[0].text
    print(f"{problem.prompt}\n{text.strip()}\n(right: {problem.answer})")


if __name__ == "__main__":
    main()
