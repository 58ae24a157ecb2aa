"""Is importance, and is distillation, worth it? One table on the small aligned model, with intervals over
seeds.

    python benchmarks/compress_table.py --out runs/compress-table --seeds 0 1 2 3 4 5

For each seed: a parent (pretrain, then SFT, by the tiny recipes); the same shape of at most 72 % of its
parameters cut out of it by importance, by the size of weights and by chance; each of the three distilled on
at most 5 % of the parent's training tokens, and again on 1 %. Beside them the first of the three fine-tuned
by cross-entropy on as many tokens, and models of that shape from scratch: on the tokens of the distillation,
on ten times as many, and on all tokens (the parent's and the distillation's). All answer the same held-out
problems, thinking, greedily: others than those on which the recipe's rate was chosen, for seed 0.

Resumable: every step is a stage or a file of its own; `--only-table` writes the table from what is there. On
one core about a quarter of an hour a seed.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path

import torch

from nanohybrid.align.sft import SftRecipe, sft
from nanohybrid.checkpoint import load, load_config, save
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import dominated, enumerate_shapes
from nanohybrid.data.build import build
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.engine import LLM
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import Budget
from nanohybrid.evaluate.perplexity import loss_of
from nanohybrid.evaluate.recipe import GenerationConfig
from nanohybrid.evaluate.suites import aggregate, answer_problems, by_family, draw_problems
from nanohybrid.files import atomic_write
from nanohybrid.model import HybridLM
from nanohybrid.prune import baselines as controls
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.measure import importance_of
from nanohybrid.prune.slicing import prune_model
from nanohybrid.prune.stage import PruneRecipe, prune
from nanohybrid.prune.target import Target
from nanohybrid.quickstart.recipes import Recipes, times
from nanohybrid.stages import plots
from nanohybrid.stages.output import read_record
from nanohybrid.stages.recipe import load as load_recipe
from nanohybrid.train.allocator import keep_freed_memory
from nanohybrid.train.pretrain import pretrain

SHARE, TOKENS, FEW = (
    0.72,
    0.05,
    0.01,
)  # of the parent's parameters, of its training tokens, and of them again for a second, shorter try
HALF = (
    0.5  # of the parent's tokens, ten times the distillation's: a model from scratch between the two others
)
RECIPE = "recipes/small/compress/compress.toml"
PROBLEMS = 240  # held-out ones of each family; two families have fewer
RANKINGS = ("importance", "magnitude", "random")
BEST = ("distilled-importance", "short-importance")
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
LABELS = {
    "parent": "parent",
    **{f"pruned-{name}": f"pruned by {name}" for name in RANKINGS},
    **{f"distilled-{name}": f"pruned by {name}, distilled on 5 %" for name in RANKINGS},
    **{f"short-{name}": f"pruned by {name}, distilled on 1 %" for name in RANKINGS},
    "tuned-importance": "pruned by importance, cross-entropy on as many tokens",
    "scratch": "that shape from scratch, the distillation's tokens",
    "scratch-half": "that shape from scratch, ten times the distillation's tokens",
    "scratch-all": "that shape from scratch, all tokens: the parent's and the distillation's",
}


class Run:
    """One seed's models, each made when it is asked for, and their scores in `scores.json`."""

    def __init__(self, out: Path, data: Path, seed: int) -> None:
        self.out, self.data, self.seed = out / f"seed-{seed}", data, seed
        self.recipes = Recipes.of(1.0, seed)
        self.trained_tokens = self.recipes.pretrain.tokens + self.recipes.sft.tokens
        self.parent = sft(
            self.recipes.sft,
            pretrain(self.recipes.pretrain, data, self.out / "base"),
            self.out / "parent",
            data,
        )

    def scores(self, by: str) -> Path:
        """A file of scores: by activations on the SFT's chats, by the size of weights, or by chance."""
        folder = self.out / f"scores-{by}"
        if by == "importance":
            found = importance_of(
                self.parent, self.calibration(), folder, scale_by_outgoing_norm=True, rounds=None
            )
        elif by == "magnitude":
            found = controls.magnitude(self.parent)
        else:
            found = controls.random(load_config(self.parent), self.seed)
        return found.save(folder)

    def calibration(self) -> Calibration:
        return Calibration.read(self.parent, self.parent, 256, 256)

    def pruned(self, by: str, target: Target) -> Path:
        return prune(PruneRecipe(target), self.parent, self.out / f"pruned-{by}", importance=self.scores(by))

    def distilled(self, by: str, target: Target, share: float, name: str) -> Path:
        recipe = dataclasses.replace(self.distillation(share), seed=self.seed)
        return distill(recipe, self.pruned(by, target), self.parent, self.parent, self.out / name)

    def distillation(self, share: float = TOKENS) -> DistillRecipe:
        """The recipe, on at most a share of the tokens that the parent was trained on."""
        recipe = small_recipe().distill
        return dataclasses.replace(
            recipe, tokens=int(self.trained_tokens * share) // recipe.batch_tokens * recipe.batch_tokens
        )

    def tuned(self, start: Path, name: str, like: SftRecipe | DistillRecipe) -> Path:
        """Cross-entropy on as many tokens of chats as the distillation reads, in as large batches, at the
        rates of `like`."""
        size = self.distillation()
        shares = dataclasses.replace(self.recipes.sft.shares, text=0.0)
        recipe = dataclasses.replace(
            self.recipes.sft, shares=shares, tokens=size.tokens, batch_tokens=size.batch_tokens
        )
        return sft(
            dataclasses.replace(recipe, optimizer=like.optimizer, schedule=like.schedule),
            start,
            self.out / name,
        )

    def blank(self, target: Target) -> Path:
        """A checkpoint of the pruned shape with fresh random weights."""
        folder = self.out / "blank"
        if not (folder / "config.json").exists():
            model = HybridLM(load_config(self.pruned("importance", target)))
            model.reset_parameters(self.seed)
            save(model, folder, assets=self.parent)
        return folder

    def whole_recipe(self, name: str, target: Target, share: float) -> Path:
        """The pruned shape from fresh weights by the parent's own recipes, on a share of its tokens."""
        config = load_config(self.pruned("importance", target))
        first = dataclasses.replace(times(self.recipes.pretrain, share, "tokens"), model=spelled(config))
        base = pretrain(first, self.data, self.out / f"{name}-base")
        return sft(times(self.recipes.sft, share, "tokens"), base, self.out / name, self.data)

    def models(self, target: Target) -> dict[str, Callable[[], Path]]:
        """Every row of the table, by name."""
        table: dict[str, Callable[[], Path]] = {"parent": lambda: self.parent}
        table |= {f"pruned-{by}": lambda by=by: self.pruned(by, target) for by in RANKINGS}  # type: ignore[misc]
        for kind, share in (("distilled", TOKENS), ("short", FEW)):
            for by in RANKINGS:
                table[f"{kind}-{by}"] = partial(self.distilled, by, target, share, f"{kind}-{by}")
        table["tuned-importance"] = lambda: self.tuned(
            self.pruned("importance", target), "tuned-importance", self.distillation()
        )
        table["scratch"] = lambda: self.tuned(self.blank(target), "scratch", self.recipes.sft)
        table["scratch-half"] = lambda: self.whole_recipe("scratch-half", target, HALF)
        table["scratch-all"] = lambda: self.whole_recipe("scratch-all", target, 1 + TOKENS)
        return table

    def score(self, name: str, model: Callable[[], Path]) -> None:
        """Measure one model, unless that was done."""
        file = self.out / "scores.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if name in known:
            return
        path = model()
        llm = LLM(path, torch.float32, max_num_seqs=256)
        answers = answer_problems(
            llm,
            draw_problems(self.recipes.evaluate.tasks, PROBLEMS, seed=1),
            GenerationConfig(max_tokens=160, thinking_grace=8),
        )
        row = {**aggregate(answers).as_dict(), "parameters": Footprint.of(llm.model.config).parameters}
        row["tokens"] = self.trained(name, path)
        row["families"] = {family: found.accuracy for family, found in by_family(answers).items()}
        row["loss"] = loss_of(llm.model, self.calibration().batches()).loss
        atomic_write(file, json.dumps({**known, name: row}, indent=2) + "\n")
        print(
            f"seed {self.seed}: {name}: {row['accuracy']:.4f} of {row['problems']}, "
            f"{row['parameters']:,} parameters",
            flush=True,
        )

    def trained(self, name: str, path: Path) -> int:
        """Tokens that a row's own training took; what its parent took is the parent's."""
        whole = {
            "parent": ["base", "parent"],
            **{name: [f"{name}-base", name] for name in ("scratch-half", "scratch-all")},
        }
        stages = whole.get(name, [path.name])
        return (
            0
            if name.startswith("pruned")
            else sum(int(read_record(self.out / stage)["tokens"]) for stage in stages)
        )


def small_recipe() -> CompressRecipe:
    with resources.as_file(resources.files("nanohybrid").joinpath(RECIPE)) as path:
        return load_recipe(CompressRecipe, Path(path))


def spelled(config: object) -> dict[str, object]:
    """A configuration as a recipe spells it out: what the tokenizer says is left to it."""
    skipped = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return {name: value for name, value in fields.items() if name not in skipped and value is not None}


def choose_shape(run: Run, out: Path) -> Target:
    """The shape of all seeds: of those of the grid within the share of parameters, the lowest loss of the
    first seed's parent."""
    file = out / "shape.json"
    if file.exists():
        return Target(**json.loads(file.read_text())["target"])
    parent, calibration = load(run.parent, dtype=torch.float32).eval(), run.calibration()
    scores = importance_of(
        run.parent, calibration, run.out / "scores-importance", scale_by_outgoing_norm=True, rounds=None
    )
    most = SHARE * Footprint.of(parent.config).parameters
    grid = small_recipe().grid
    found = enumerate_shapes(parent.config, scores, grid, Budget(2**40, 1)).candidates
    found = tuple(candidate for candidate in found if candidate.parameters <= most)
    tried = [candidate for candidate in found if not dominated(candidate, found)][: grid.max_evaluated]
    losses = [
        loss_of(prune_model(parent, c.target.select(parent.config, scores)), calibration.batches()).loss
        for c in tried
    ]
    best = tried[losses.index(min(losses))]
    table = [{**c.as_dict(), "loss": loss} for c, loss in zip(tried, losses, strict=True)]
    atomic_write(
        file, json.dumps({"target": dataclasses.asdict(best.target), "tried": table}, indent=2) + "\n"
    )
    return best.target


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval over the seeds."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), T975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def rows(table: dict[int, dict[str, dict[str, float]]]) -> Iterator[dict[str, object]]:
    """A row a model over the seeds that have it: accuracy, its share of the parent's, and by how much the one
    that was pruned by importance and distilled on as many tokens is ahead; those that are not distilled are
    set against that on 5 %."""
    for name, label in LABELS.items():
        seeds = [seed for seed, scores in table.items() if name in scores and "parent" in scores]
        if not seeds:
            continue
        mine = [table[seed][name]["accuracy"] for seed in seeds]
        share = [table[seed][name]["accuracy"] / table[seed]["parent"]["accuracy"] for seed in seeds]
        best = "short-importance" if name.startswith("short") else "distilled-importance"
        both = [seed for seed in seeds if best in table[seed]]
        ahead = [table[seed][best]["accuracy"] - table[seed][name]["accuracy"] for seed in both]
        yield {
            "name": name, "label": label, "seeds": seeds, "parameters": table[seeds[0]][name]["parameters"],
            "tokens": table[seeds[0]][name]["tokens"], "accuracy": mine,
            "mean": interval(mine), "recovered": interval(share), "ahead": interval(ahead) if ahead else None,
            "loss": interval([table[seed][name]["loss"] for seed in seeds]),
        }  # fmt: skip


def percent(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return ""
    return f"{100 * pair[0]:.1f}" + ("" if math.isnan(pair[1]) else f" +- {100 * pair[1]:.1f}")


def write_table(out: Path) -> str:
    """`table.json`, `table.md` and `table.svg` of all seeds measured so far."""
    table = {
        int(file.parent.name.split("-")[1]): json.loads(file.read_text())
        for file in sorted(out.glob("seed-*/scores.json"))
    }
    found = list(rows(table))
    heads = [
        "model",
        "parameters",
        "trained on, tokens",
        "seeds",
        "accuracy, %",
        "of the parent's, %",
        "behind importance, points",
        "loss",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in found:
        ahead = "" if row["name"] in BEST else percent(row["ahead"])
        loss = f"{row['loss'][0]:.3f}"
        sizes = [f"{row['parameters']:,}", f"{row['tokens']:,}" if row["tokens"] else "", len(row["seeds"])]
        cells = [row["label"], *sizes, percent(row["mean"]), percent(row["recovered"]), ahead, loss]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = "\n".join(lines) + "\n"
    atomic_write(out / "table.json", json.dumps(found, indent=2) + "\n")
    atomic_write(out / "table.md", text)
    return text


def draw(out: Path) -> None:
    """The table as a picture: a bar a model, a dot a seed."""
    found = json.loads((out / "table.json").read_text())
    with plots.style():
        figure, axes = plots.canvas("held-out problems solved, %", "", "", height=0.7 + 0.38 * len(found))
        for place, row in enumerate(found):
            color = plots.COLORS[1 if row["name"] in BEST else 0]
            axes.barh(place, 100 * row["mean"][0], 0.62, color=color)
            axes.plot(
                [100 * value for value in row["accuracy"]],
                [place] * len(row["accuracy"]),
                "o",
                color=plots.INK,
                markersize=3,
            )
        axes.set_yticks(
            range(len(found)),
            [row["label"].replace(": the parent's and the distillation's", "") for row in found],
        )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.savefig(
            out / "table.svg", facecolor="white", metadata={"Date": None}
        )  # inside the style: text stays text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--only-table", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out
    if not arguments.only_table:
        keep_freed_memory()
        data = build(Recipes.of(1.0, 0).data, out / "data")
        target: Target | None = None
        later = []
        for seed in arguments.seeds:
            run = Run(out, data, seed)
            target = target or choose_shape(run, out)
            models = run.models(target)
            later += [(name, run, models.pop(name)) for name in ("scratch-half", "scratch-all")]
            for name, make in models.items():
                run.score(name, make)
        for name, run, make in later:  # the longest last, so that the rest of the table is there early
            run.score(name, make)
    print(write_table(out))
    draw(out)


if __name__ == "__main__":
    main()
