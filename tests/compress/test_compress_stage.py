"""Distillation and the whole stage on tiny random models, killed and resumed."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from compress_models import DENSE, make_model

from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.compress import default_calibration as documents
from nanohybrid.compress import search, stage
from nanohybrid.compress.default_calibration import documents_for
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.stage import compress
from nanohybrid.compress.successive_halving import RaceRecipe
from nanohybrid.data import Batch, TokenStore
from nanohybrid.distill.stage import DistillRecipe, distill, divergence, mean_divergence, mixture
from nanohybrid.errors import InputError
from nanohybrid.prune.selection import Selection
from nanohybrid.stages.recipe import dump
from nanohybrid.text import ChatTemplate, train_bpe
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

DISTILL = DistillRecipe(
    tokens=600, batch_tokens=100, sequence_length=40, optimizer=OptimizerConfig(learning_rate=1e-2), precision=PrecisionConfig("fp32"),
    loop=LoopConfig(snapshot_steps=2, log_steps=1), measured_tokens=200,
)  # fmt: skip
RECIPE = CompressRecipe(
    budget_share=0.8, context=64, samples=8, length=30, distill=DISTILL,
    grid=Grid(multiple=4, tried=2, fractions={"hidden_size": (1.0, 0.75), "intermediate_size": (1.0, 0.75, 0.5),
    "mamba_head_dim": (1.0, 0.5)}),
)  # fmt: skip


def write_store(path, seed, count=30):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    TokenStore.from_documents(
        (rng.integers(13, 60, n), np.r_[np.zeros(2), np.ones(n - 2)]) for n in rng.integers(5, 30, count)
    ).write(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A parent, a stage's output with stores in it, and pretraining documents."""
    root = tmp_path_factory.mktemp("compress")
    train_bpe(["some words"], 269).save(root / "parent")
    ChatTemplate.default().save(root / "parent")
    save(make_model(vocab_size=269).float(), root / "parent")
    write_store(root / "sft" / "stores" / "chats.safetensors", 0)
    write_store(root / "data" / "web.safetensors", 1)
    write_store(root / "data" / "code.safetensors", 2, count=60)
    write_store(root / "data" / "validation.safetensors", 3)
    return root


def test_the_loss_is_the_divergence_from_whole_logits(model):
    other = make_model("M-*-")
    batch = Batch.of([(np.arange(20, 33), np.r_[np.zeros(4), np.ones(9)]), (np.arange(40, 47), np.ones(7))])
    total, count = divergence(model, 2.0, every_token=False)(other, batch)
    logp = [(m(batch.tokens_T, layout=batch.layout) / 2.0).log_softmax(-1) for m in (model, other)]
    kl = 4.0 * (logp[0].exp() * (logp[0] - logp[1])).sum(-1)[batch.targets_T != -100]
    assert count == len(kl) == 9 + 6
    assert total.item() == pytest.approx(kl.sum().item(), rel=1e-5)
    assert divergence(model, 2.0, every_token=True)(other, batch)[1] == 20
    assert mean_divergence(model, model, [batch]) == pytest.approx(0.0, abs=1e-6)


def test_the_papers_mixture(folders):
    stores, weights = mixture(DISTILL, folders / "sft", folders / "data")
    assert set(stores) == {"post-chats", "pre-web", "pre-code"} and weights["post-chats"] == pytest.approx(
        0.7
    )
    assert (
        weights["pre-web"] + weights["pre-code"] == pytest.approx(0.3)
        and weights["pre-code"] > weights["pre-web"]
    )
    assert mixture(DISTILL, folders / "sft", None)[1] == {"post-chats": 1.0}


def test_a_student_comes_nearer_to_its_teacher(folders, tmp_path):
    assert (
        main(["prune", str(folders / "parent"), "--out", str(tmp_path / "student"), "--drop-layers", "1"])
        == 0
    )
    out = distill(
        DISTILL, tmp_path / "student", folders / "parent", folders / "sft", tmp_path / "out", folders / "data"
    )
    measures = json.loads((out / "lineage.json").read_text())["measures"]
    assert measures["kl_after"] < 0.8 * measures["kl_before"]
    assert (out / "tokenizer.json").exists() and not (out / "snapshot.safetensors").exists()


def test_the_command_distils_from_a_teacher_held_anywhere(folders, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(dump(replace(DISTILL, tokens=200)))
    command = [
        "distill",
        str(folders / "parent"),
        str(folders / "parent"),
        "--recipe",
        str(tmp_path / "recipe.toml"),
    ]
    command += ["--teacher", "int8", "--data", str(folders / "sft"), "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    assert (
        0 < json.loads(capsys.readouterr().out)["kl_before"] < 0.1
    )  # its own teacher, but for the rounding of int8


def test_other_vocabularies_are_refused(folders, tmp_path):
    save(make_model().float(), tmp_path / "student")
    with pytest.raises(InputError, match="vocabulary of 60"):
        distill(DISTILL, tmp_path / "student", folders / "parent", folders / "sft", tmp_path / "out")


@pytest.fixture(scope="module")
def whole(folders):
    """The stage run by its command, in one go; what it printed."""
    recipe, out = folders / "recipe.toml", io.StringIO()
    recipe.write_text(dump(RECIPE))
    command = ["compress", str(folders / "parent"), "--recipe", str(recipe), "--data", str(folders / "sft")]
    with redirect_stdout(out):
        assert (
            main(
                [*command, "--pretraining", str(folders / "data"), "--out", str(folders / "whole"), "--json"]
            )
            == 0
        )
    return json.loads(out.getvalue())


def test_the_command_gives_a_loadable_checkpoint_within_the_budget_and_a_report(folders, whole):
    out = folders / "whole"
    assert whole["chosen"]["bytes"]["total"] <= whole["budget_bytes"] and set(whole["losses"]) == {
        "parent",
        "pruned",
        "distilled",
    }
    model, selection = load(out), Selection.read(out)
    assert sum(p.numel() for p in model.parameters()) == whole["chosen"]["parameters"]
    assert selection.config(load(folders / "parent").config) == model.config
    for part in (
        "importance/importance.json",
        "search/search.json",
        "pruned/pruning_mask.json",
        "pruned/kept.json",
        "distilled/model.safetensors",
        "tokenizer.json",
    ):
        assert (out / part).exists()
    whole_of, part_of = (
        json.loads((path / "lineage.json").read_text())["tokens"] for path in (out, out / "distilled")
    )
    assert whole_of == part_of > 0  # tokens of the distillation count as the stage's
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 11 and "partial" not in page


def test_a_budget_below_the_smallest_is_one_line(folders, tmp_path, capsys):
    command = [
        "compress",
        str(folders / "parent"),
        "--data",
        str(folders / "sft"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--budget-gib", "0.000001"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "no shape of the grid fits" in error[0] and "the smallest takes" in error[0]
    assert not list(tmp_path.iterdir())  # said before anything is measured


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grid.drop_layers", "[9]"], "the model has 7 layers; nearest 6"),
        (["--grid.drop_layers", "[-1]"], "each 0 or more"),
        (
            ["--distill.between.weight", "1", "--distill.between.layers", "[44]"],
            "the teacher has layers 0 to 6",
        ),
    ],
)
def test_what_no_shape_can_be_is_said_before_anything_is_measured(folders, tmp_path, capsys, flags, words):
    command = [
        "compress",
        str(folders / "parent"),
        "--data",
        str(folders / "sft"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and words in error[0] and not list(tmp_path.iterdir())


def test_a_resumed_search_tries_no_shape_again(folders, whole, tmp_path, monkeypatch):
    def run():
        return compress(RECIPE, folders / "parent", folders / "sft", tmp_path / "parts", folders / "data")

    def stop(*_):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(stage, "decide", stop)
        run()
    monkeypatch.setattr(search, "prune_model", stop)  # the search is complete and tries nothing again
    assert (run() / "pruning_mask.json").read_text() == (folders / "whole" / "pruning_mask.json").read_text()


def test_without_documents_the_models_own_chats_are_read_and_else_this_pythons_prose(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "MEGABYTES", 0.02)
    assert documents_for(folders / "sft", tmp_path / "unused") == folders / "sft"
    short = ["--samples", "4", "--length", "20", "--grid.tried", "1", "--grid.multiple", "4"]
    short += [
        "--distill.tokens",
        "300",
        "--distill.batch_tokens",
        "200",
        "--distill.sequence_length",
        "50",
        "--distill.measured_tokens",
        "100",
    ]
    command = [
        "compress",
        str(folders / "parent"),
        "--budget-gib",
        "0.0011",
        "--context",
        "64",
        "--out",
        str(tmp_path / "out"),
        *short,
    ]
    assert main(command) == 0
    assert {path.stem for path in (tmp_path / "out" / "documents").glob("*.safetensors")} >= {"prose", "code"}
    assert load(tmp_path / "out").config.hidden_size <= load(folders / "parent").config.hidden_size


def test_a_dense_model_compresses_by_the_same_command_after_a_race(folders, tmp_path):
    parent = tmp_path / "dense"
    train_bpe(["some words"], 269).save(parent)
    save(make_model("*-*-", **DENSE, vocab_size=269).float(), parent)
    recipe = replace(
        RECIPE,
        budget_share=0.9,
        race=RaceRecipe(3, 200),
        grid=replace(
            RECIPE.grid, fractions={**RECIPE.grid.fractions, "num_attention_heads": (1.0, 0.5)}, tried=3
        ),
    )
    (tmp_path / "recipe.toml").write_text(dump(recipe))
    command = [
        "compress",
        str(parent),
        "--recipe",
        str(tmp_path / "recipe.toml"),
        "--data",
        str(folders / "sft"),
        "--out",
    ]
    assert main([*command, str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["num_hidden_layers"] == 2
    found = json.loads((tmp_path / "out" / "search" / "search.json").read_text())["candidates"]
    assert [row["healed"] is not None for row in found[:3]] == [True] * 3 and found[0][
        "tokens_per_second"
    ] > 0
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "metrics" / "race.jsonl").read_text().splitlines()
    ]
    assert [row["round"] for row in rows] == [0, 0, 0, 1, 1]
