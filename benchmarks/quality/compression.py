"""Compression of a real model on real text: importance against magnitude and chance, before and after
distillation.

    python benchmarks/quality/text.py *.deb --out text
    python benchmarks/quality/compression.py MODEL --text text --out runs/real-compression

For each share of the parameters, `nanohybrid compress` selects a shape by importance, prunes and distills.
The same shape is cut out by the size of weights, by chance, and by layers that were ranked in one pass
("one-shot"; the same as importance where no layers go). Each is distilled on as many tokens. All are
evaluated on held-out documents: perplexity, KL divergence from the original in nats, and how often the most
probable token is the original's. Errors of a row are standard errors over documents. With several seeds the
table has Student's 95 % intervals over them. A seed orders the training documents and draws the scores of
chance.

Resumable: every step is a stage of its own, and `results.json` has each row that is done.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanohybrid.checkpoint import CheckpointReader, load, load_config, resolve
from nanohybrid.compress import CompressRecipe, Grid, compress
from nanohybrid.data import Batch, TokenStore
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.estimate import Footprint
from nanohybrid.files import atomic_write
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import chunked_cross_entropy, chunked_forward_kl
from nanohybrid.prune import baselines
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.measure import ONE_SHOT, DepthRanking, importance_of
from nanohybrid.prune.stage import PruneRecipe, prune
from nanohybrid.prune.target import Target
from nanohybrid.text import Tokenizer
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

WINDOW = 512
"""Tokens of a training document: longer ones are cut into pieces of this length."""
METHODS = ("importance", "one-shot", "random", "magnitude")
KINDS = ("pruned", "distilled")
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
Sample = tuple[np.ndarray, np.ndarray]


def documents(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each document of a file of JSON lines with `text`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            ids = tokenizer.encode(json.loads(line)["text"], parse_special=False)
            yield np.array(ids, dtype=np.int32)


def sample(ids: np.ndarray) -> Sample:
    """A document all of whose tokens are targets."""
    return ids, np.ones(len(ids), dtype=np.uint8)


def windows(ids: np.ndarray) -> Iterator[Sample]:
    """A document in pieces of WINDOW tokens; a last piece of less than half is left out."""
    for begin in range(0, len(ids), WINDOW):
        if len(piece := ids[begin : begin + WINDOW]) >= WINDOW // 2:
            yield sample(piece)


@torch.inference_mode()
def evaluate(model: HybridLM, parent: HybridLM, held_out: Calibration) -> dict[str, float]:
    """Perplexity, KL divergence from the parent and agreement with it; standard errors over documents."""
    rows = []
    for document in held_out.samples:
        batch = Batch.of([document])
        pair = [(one.hidden(batch.tokens_T, batch.layout), one.head_weight) for one in (model, parent)]
        mask_T = batch.targets_T >= 0
        losses = [
            float(chunked_cross_entropy(h_TE, head_VE, batch.targets_T).double().sum())
            for h_TE, head_VE in pair
        ]
        kl_T = chunked_forward_kl(*pair[0], *pair[1], mask_T=mask_T)
        top_T, expected_T = ((h_TE @ head_VE.T).argmax(-1) for h_TE, head_VE in pair)
        same = int(((top_T == expected_T) & mask_T).sum())
        rows.append([int(mask_T.sum()), *losses, float(kl_T.double().sum()), same])
    count, loss, base, kl, same_D = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return {
        "tokens": int(count.sum()),
        "documents": len(count),
        "perplexity": math.exp(loss.sum() / count.sum()),
        "parent_perplexity": math.exp(base.sum() / count.sum()),
        "loss_increase": float((loss - base).sum() / count.sum()),
        "loss_increase_error": ratio_error(loss - base, count),
        "kl": float(kl.sum() / count.sum()),
        "kl_error": ratio_error(kl, count),
        "agreement": float(same_D.sum() / count.sum()),
        "agreement_error": ratio_error(same_D, count),
    }


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """The standard error of sum(sums) / sum(counts) over documents."""
    rest = sums - sums.sum() / counts.sum() * counts
    return float(np.sqrt((rest**2).sum() * len(rest) / (len(rest) - 1)) / counts.sum())


class Run:
    """One model, its text and the rows of its table."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out
        self.model = resolve(given.model)
        self.config = load_config(self.model)
        tokenizer = Tokenizer.from_directory(self.model)
        self.data = self.out / "data"
        if not (self.data / "text.safetensors").exists():
            self.data.mkdir(parents=True, exist_ok=True)
            text = documents(given.text / "calibration.jsonl", tokenizer)
            pieces = (piece for ids in text for piece in windows(ids))
            TokenStore.from_documents(pieces).write(self.data / "text.safetensors")
        ends = tuple(sample(ids[:WINDOW]) for ids in documents(given.text / "held-out.jsonl", tokenizer))
        self.held_out = Calibration(ends).spread(given.held_out_tokens)
        self.parent = load(self.model, torch.float32).eval()

    def distillation(self, seed: int) -> DistillRecipe:
        """The recipe of all rows."""
        return DistillRecipe(
            tokens=self.given.tokens,
            batch_tokens=2048,
            sequence_length=WINDOW,
            optimizer=OptimizerConfig(learning_rate=self.given.learning_rate, weight_decay=0.0),
            precision=PrecisionConfig(self.given.precision),
            loop=LoopConfig(log_steps=5, snapshot_steps=50),
            measured_tokens=4096,
            seed=seed,
        )

    def recipe(self, share: float, seed: int) -> CompressRecipe:
        """`compress` to a share of the weights' bytes."""
        footprint = Footprint.of(self.config, torch.bfloat16)
        return CompressRecipe(
            budget_bytes=footprint.total(1, 1) - int((1 - share) * footprint.weight_bytes),
            context=1,
            num_calibration_samples=self.given.samples,
            max_calibration_length=WINDOW,
            depth_tokens=self.given.depth_tokens,
            stream=False,
            grid=Grid(
                drop_layers=tuple(self.given.drop_layers),
                fractions={
                    "hidden_size": (1.0, 0.9375, 0.875),
                    "intermediate_size": (1.0, 0.875, 0.75, 0.625, 0.5),
                    "num_attention_heads": (1.0,),
                },
                max_evaluated=self.given.max_evaluated,
            ),
            distill=self.distillation(seed),
        )

    def scores(self, method: str, seed: int) -> Path:
        """The file of scores of a baseline."""
        folder = self.out / f"scores-{method}-{seed}"
        if method == "random":
            return baselines.random(self.config, seed).save(folder)
        if method == "magnitude":
            return baselines.magnitude(self.model).save(folder)
        samples = Calibration.read(self.data, self.model, self.given.samples, WINDOW)
        depth = DepthRanking(ONE_SHOT, tokens=self.given.depth_tokens)
        most = max(self.given.drop_layers)
        return importance_of(self.model, samples, folder, True, most, depth).save(folder)

    def checkpoints(self, share: float, method: str, seed: int) -> Iterator[Path]:
        """The pruned and the distilled checkpoint, each when it is made."""
        name = f"{round(100 * share)}-{method}-{seed}"
        if method == "importance":
            folder = compress(self.recipe(share, seed), self.model, self.data, self.out / name)
            yield from (folder / kind for kind in KINDS)
            return
        target = self.target(share, method, seed)
        scores = self.scores(method, seed)
        pruned = prune(PruneRecipe(target), self.model, self.out / f"{name}-pruned", importance=scores)
        yield pruned
        yield distill(self.distillation(seed), pruned, self.model, self.data, self.out / f"{name}-distilled")

    def target(self, share: float, method: str, seed: int) -> Target:
        """The shape that the search by importance selected. Neither baseline ranks layers: both lose random
        ones."""
        first = self.out / f"{round(100 * share)}-importance-{self.given.seeds[0]}"
        shape = dict(json.loads((first / "search" / "search.json").read_text())["candidates"][0]["config"])
        shape.pop("pattern")
        layers = shape.pop("num_hidden_layers")
        gone = self.config.num_hidden_layers - layers
        if method == "one-shot" or not gone:
            return Target(layers=layers, sizes=shape)
        order = baselines.random(self.config, seed).order
        return Target(drop_layers=tuple(sorted(order[:gone])), sizes=shape)

    def measure(self, share: float, method: str, seed: int, kinds: tuple[str, ...]) -> None:
        """Make and evaluate the rows of one method, unless that was done."""
        keys = {kind: f"{round(100 * share)} {method} {seed} {kind}" for kind in kinds}
        if all(key in self.results for key in keys.values()):
            return
        for kind, path in zip(KINDS, self.checkpoints(share, method, seed), strict=False):
            if kind in kinds and keys[kind] not in self.results:
                model = load(path, torch.float32).eval()
                with CheckpointReader(path) as reader:
                    sizes = {
                        "parameters": Footprint.of(model.config).parameters,
                        "bytes": reader.stored_bytes,
                    }
                row = {**evaluate(model, self.parent, self.held_out), **sizes}
                atomic_write(
                    self.out / "results.json", json.dumps({**self.results, keys[kind]: row}, indent=2) + "\n"
                )
                print(f"{keys[kind]}: perplexity {row['perplexity']:.2f}, KL {row['kl']:.3f}", flush=True)
            if kind == kinds[-1]:
                return

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """The rows that are done."""
        file = self.out / "results.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}


def interval(values: list[float]) -> str:
    """Mean, with Student's 95 % interval where there are several."""
    mean = statistics.fmean(values)
    digits = 3 if abs(mean) < 10 else 1 if abs(mean) < 1000 else 0
    if len(values) < 2:
        return f"{mean:,.{digits}f}"
    half = T975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:,.{digits}f} ± {half:,.{digits}f}"


def table(results: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown."""
    grouped: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for key, row in results.items():
        share, method, _, kind = key.split()
        grouped.setdefault((share, method, kind), []).append(row)
    lines = [
        "| parameters | chosen by | | seeds | perplexity | KL, nats | same token |",
        "|---|---|---|---|---|---|---|",
    ]
    for (share, method, kind), rows in grouped.items():
        cells = [interval([row[name] for row in rows]) for name in ("perplexity", "kl", "agreement")]
        count = rows[0]["parameters"] / 1e6
        lines.append(f"| {count:.1f} M ({share} %) | {method} | {kind} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a checkpoint directory, an id of the Hub, or a .gguf file")
    parser.add_argument("--text", type=Path, required=True, help="what benchmarks/quality/text.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--tokens", type=int, default=204_800, help="of a distillation")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--samples", type=int, default=128, help="calibration documents of 512 tokens")
    parser.add_argument("--held-out-tokens", type=int, default=50_000)
    parser.add_argument("--drop-layers", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--depth-tokens", type=int, default=2048)
    parser.add_argument("--max-evaluated", type=int, default=8)
    given = parser.parse_args()
    run = Run(given)
    kinds = tuple(kind for kind in KINDS if kind in given.only)
    for share in given.shares:
        for seed in given.seeds:
            for method in sorted(given.methods, key=METHODS.index):  # importance selects the others' shape
                run.measure(share, method, seed, kinds)
    (given.out / "table.md").write_text(table(run.results))
    print(table(run.results))


if __name__ == "__main__":
    main()
