"""`nanohybrid prune` from disk to disk, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from compress_models import DENSE, make_model

from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.cli.prune import SIZES
from nanohybrid.prune.prunable import known_axes
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_model
from nanohybrid.text import ChatTemplate, train_bpe

ALL = [
    "--hidden-size",
    "24",
    "--intermediate-size",
    "30",
    "--mamba-heads",
    "4",
    "--mamba-head-dim",
    "6",
    "--attention-heads",
    "2",
]


@pytest.fixture(scope="module", params=["hybrid", "dense"])
def parent(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    train_bpe(["some words"], 269).save(folder)
    ChatTemplate.default().save(folder)
    model = (
        make_model(vocab_size=269)
        if request.param == "hybrid"
        else make_model("*-*-", **DENSE, vocab_size=269)
    )
    save(model.float(), folder)
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of some text"}) + "\n" for i in range(5))
    )
    return folder, request.param


def test_prune_command_equals_prune_model(parent, tmp_path, capsys):
    folder, kind = parent
    flags = ALL if kind == "hybrid" else [*ALL[:4], "--attention-heads", "2"]
    layers = "6" if kind == "hybrid" else "2"
    command = [
        "prune",
        str(folder),
        "--calibration",
        str(folder / "text.jsonl"),
        "--layers",
        layers,
        *flags,
        "--json",
    ]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    told = json.loads(capsys.readouterr().out)
    pruned, selection = load(tmp_path / "a"), Selection.read(tmp_path / "a")
    want = prune_model(load(folder), selection)
    assert pruned.config == want.config and told["pruned"]["parameters"] == sum(
        p.numel() for p in pruned.parameters()
    )
    assert all(torch.equal(tensor, want.state_dict()[name]) for name, tensor in pruned.state_dict().items())
    assert {"tokenizer.json", "chat_template.jinja", "lineage.json", "pruning_mask.json", "kept.json"} <= {
        path.name for path in (tmp_path / "a").iterdir()
    }
    scores = tmp_path / "a" / "importance" / "importance.safetensors"
    again = [
        "prune",
        str(folder),
        "--importance",
        str(scores),
        "--layers",
        layers,
        *flags,
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(again) == 0 and Selection.read(tmp_path / "b") == selection


def test_prune_command_drops_named_layers_without_scores(parent, tmp_path):
    folder, _ = parent
    assert main(["prune", str(folder), "--out", str(tmp_path / "a"), "--drop-layers", "2,1"]) == 0
    assert not {1, 2} & set(Selection.read(tmp_path / "a").layers)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "99"], "nearest"),
        (["--drop-layers", "77"], "no such layer"),
        (["--drop-layers", "x"], "numbers with commas"),
        (["--hidden-size", "512"], "nearest 32"),
        (["--hidden-size", "16"], "--calibration"),
        (["--attention-heads", "3"], "nearest 2 or 4"),
    ],
)
def test_command_refuses_in_one_line_and_writes_nothing(parent, tmp_path, capsys, flags, message):
    assert main(["prune", str(parent[0]), "--out", str(tmp_path / "a"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_size_flags_are_those_that_the_mixers_declare():
    """The table of the command is written out, since its help must not import torch."""
    assert set(SIZES) == {one.flag for one in known_axes().values()}


def test_help_of_prune_does_not_import_torch():
    code = """
import sys
from nanohybrid.cli.main import main
main(["prune", "--help"])
print("torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines()[-1] == "False" and "--attention-heads" in run.stdout
