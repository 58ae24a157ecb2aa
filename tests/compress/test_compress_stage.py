"""The stage `compress` on tiny random models: its result, its refusals, and a resumed run."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
from compress_models import DENSE, make_model, write_folders

from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.compress import default_calibration as documents
from nanohybrid.compress import search, stage
from nanohybrid.compress.default_calibration import documents_for
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.stage import compress
from nanohybrid.compress.successive_halving import SuccessiveHalvingRecipe
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.prune.selection import Selection
from nanohybrid.stages.recipe import dump
from nanohybrid.text import train_bpe
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

DISTILL = DistillRecipe(
    tokens=600,
    batch_tokens=100,
    sequence_length=40,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    precision=PrecisionConfig("fp32"),
    loop=LoopConfig(snapshot_steps=2, log_steps=1),
    measured_tokens=200,
)
RECIPE = CompressRecipe(
    budget_share=0.8,
    context=64,
    num_calibration_samples=8,
    max_calibration_length=30,
    distill=DISTILL,
    grid=Grid(
        multiple=4,
        max_evaluated=2,
        fractions={
            "hidden_size": (1.0, 0.75),
            "intermediate_size": (1.0, 0.75, 0.5),
            "mamba_head_dim": (1.0, 0.5),
        },
    ),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("compress"))


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


def test_compress_command_writes_a_checkpoint_within_the_budget_and_a_report(folders, whole):
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


def test_compress_refuses_a_budget_below_the_smallest_shape_in_one_line(folders, tmp_path, capsys):
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
            ["--distill.hidden-state-loss.weight", "1", "--distill.hidden-state-loss.layers", "[44]"],
            "the teacher has layers 0 to 6",
        ),
    ],
)
def test_compress_refuses_impossible_layers_before_anything_is_measured(
    folders, tmp_path, capsys, flags, words
):
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


def test_compress_resumed_search_evaluates_no_candidate_again(folders, whole, tmp_path, monkeypatch):
    def run():
        return compress(RECIPE, folders / "parent", folders / "sft", tmp_path / "parts", folders / "data")

    def stop(*_):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(stage, "select_candidate", stop)
        run()
    monkeypatch.setattr(search, "prune_model", stop)  # the search is complete and tries nothing again
    assert (run() / "pruning_mask.json").read_text() == (folders / "whole" / "pruning_mask.json").read_text()


def test_compress_without_data_uses_the_chats_of_the_model_else_text_of_python(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "MEGABYTES", 0.02)
    assert documents_for(folders / "sft", tmp_path / "unused") == folders / "sft"
    short = ["--samples", "4", "--length", "20", "--grid.max_evaluated", "1", "--grid.multiple", "4"]
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


def test_compress_command_compresses_a_dense_model_with_successive_halving(folders, tmp_path):
    parent = tmp_path / "dense"
    train_bpe(["some words"], 269).save(parent)
    save(make_model("*-*-", **DENSE, vocab_size=269).float(), parent)
    recipe = replace(
        RECIPE,
        budget_share=0.9,
        successive_halving=SuccessiveHalvingRecipe(3, 200),
        grid=replace(
            RECIPE.grid,
            fractions={**RECIPE.grid.fractions, "num_attention_heads": (1.0, 0.5)},
            max_evaluated=3,
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
    assert [row["distilled_kl"] is not None for row in found[:3]] == [True] * 3 and found[0][
        "tokens_per_second"
    ] > 0
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "metrics" / "successive_halving.jsonl").read_text().splitlines()
    ]
    assert [row["round"] for row in rows] == [0, 0, 0, 1, 1]
