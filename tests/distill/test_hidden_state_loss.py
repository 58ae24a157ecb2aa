"""The loss on hidden states: what is compared, what has a gradient, and that a killed run resumes to the same
bytes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from compress_models import make_calibration, make_model

from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.data import Batch, TokenStore
from nanohybrid.distill.hidden_state_loss import HiddenStateLoss, HiddenStateLossRecipe
from nanohybrid.distill.losses import kl_loss
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.distill.teacher import open_teacher
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_checkpoint
from nanohybrid.prune.target import Target
from nanohybrid.text import train_bpe
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

RECIPE = DistillRecipe(
    tokens=600,
    batch_tokens=100,
    sequence_length=40,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    precision=PrecisionConfig("fp32"),
    loop=LoopConfig(snapshot_steps=1, log_steps=1),
    measured_tokens=100,
    hidden_state_loss=HiddenStateLossRecipe(2.0),
)
TARGET = Target(drop_layers=(1,), sizes={"hidden_size": 24, "intermediate_size": 32})
BATCH = Batch.of([(np.arange(20, 33), np.r_[np.zeros(4), np.ones(9)]), (np.arange(40, 47), np.ones(7))])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A parent, and a student that lost a layer, channels and neurons."""
    root, rng = tmp_path_factory.mktemp("hidden-states"), np.random.default_rng(0)
    model = make_model(vocab_size=269)
    train_bpe(["some words"], 269).save(root / "parent")
    save(model.float(), root / "parent")
    scores = measure_activations(model, make_calibration())
    (root / "student").mkdir()
    prune_checkpoint(root / "parent", TARGET.select(model.config, scores), root / "student")
    documents = [
        (rng.integers(13, 60, n), np.r_[np.zeros(2), np.ones(n - 2)]) for n in rng.integers(5, 30, 30)
    ]
    (root / "data").mkdir()
    TokenStore.from_documents(documents).write(root / "data" / "chats.safetensors")
    return root


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_state_loss_compares_the_remaining_layers_and_channels(root, kind):
    student, teacher = load(root / "student", dtype=torch.float32), load(root / "parent", dtype=torch.float32)
    loss = HiddenStateLoss.of(HiddenStateLossRecipe(3.0, (2, 6), kind), root / "student", root / "parent")
    selection = Selection.read(root / "student")

    def states(model):
        h_TE, found = model.backbone.embeddings(BATCH.tokens_T), []
        for block in model.backbone.layers:
            h_TE = block(h_TE, BATCH.layout, None)
            found.append(h_TE.detach().double())
        return found

    mine, theirs, wanted_T = states(student), states(teacher), 0
    for layer in (2, 6):  # the student lost layer 1, so they are its layers 1 and 5
        s, t = mine[layer - 1], theirs[layer][:, list(selection.hidden)]
        wanted_T = wanted_T + (
            (s - t).norm(dim=1) ** 2 / t.norm(dim=1) ** 2
            if kind == "mse"
            else 1 - (s * t).sum(1) / s.norm(dim=1) / t.norm(dim=1)
        )
    targets = BATCH.targets_T != -100
    total = [kl_loss(teacher, 1.0, False, extra)(student, BATCH)[0].item() for extra in (loss, None)]
    assert total[0] - total[1] == pytest.approx(3.0 * (wanted_T[targets] / 2).sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_state_loss_of_an_unpruned_student_is_0(root, kind):
    loss = HiddenStateLoss.of(HiddenStateLossRecipe(1.0, kind=kind), root / "parent", root / "parent")
    model = load(root / "parent", dtype=torch.float32)
    assert len(loss.layers) == 7 and loss.mean(model, model, [BATCH]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("place", ["beside", "offloaded", "int8"])
def test_hidden_state_loss_has_a_gradient_for_the_student_alone(root, place):
    student = load(root / "student", dtype=torch.float32)
    loss = HiddenStateLoss.of(HiddenStateLossRecipe(1.0, (5,)), root / "student", root / "parent")
    with open_teacher(root / "parent", place) as teacher:
        loss.run(student, teacher, BATCH)[2].sum().backward()
        assert place == "offloaded" or all(parameter.grad is None for parameter in teacher.parameters())
    reached = [
        block.norm.weight.grad is not None and bool(block.norm.weight.grad.any())
        for block in student.backbone.layers
    ]
    assert reached == [True] * 5 + [
        False
    ]  # the student's layer 4 is the teacher's 5; the layer after it is not compared


def test_distill_with_hidden_state_loss_resumes_to_the_same_bytes_and_lowers_it(root, tmp_path, monkeypatch):
    whole = distill(RECIPE, root / "student", root / "parent", root / "data", tmp_path / "whole")
    measures = json.loads((whole / "lineage.json").read_text())["measures"]
    assert measures["hidden_state_loss_after"] < 0.9 * measures["hidden_state_loss_before"]
    for name in ("pruning_mask.json", "kept.json"):
        assert (whole / name).read_text() == (root / "student" / name).read_text()
    calls, original = [], HiddenStateLoss.run

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise InterruptedError
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(HiddenStateLoss, "run", dying)
        distill(RECIPE, root / "student", root / "parent", root / "data", tmp_path / "out")
    assert (tmp_path / "out.partial" / "snapshot.safetensors").exists()
    out = distill(RECIPE, root / "student", root / "parent", root / "data", tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("layer", "words"),
    [(1, "the student does not have it; nearest 0"), (9, "layers 0 to 6; nearest 6"), (-1, "nearest 0")],
)
def test_hidden_state_loss_refuses_a_missing_layer_in_one_line(root, tmp_path, capsys, layer, words):
    command = [
        "distill",
        str(root / "student"),
        str(root / "parent"),
        "--data",
        str(root / "data"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert (
        main([*command, "--hidden-state-loss.weight", "1", "--hidden-state-loss.layers", f"[{layer}]"]) == 2
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0] and not list(tmp_path.iterdir())


def test_hidden_state_loss_refuses_a_student_without_its_pruning_mask(root, tmp_path):
    save(load(root / "student"), tmp_path / "bare")
    with pytest.raises(InputError, match=r"holds no pruning_mask\.json"):
        HiddenStateLoss.of(HiddenStateLossRecipe(1.0), tmp_path / "bare", root / "parent")
    with pytest.raises(InputError, match="is not about"):
        HiddenStateLoss.of(HiddenStateLossRecipe(1.0), root / "student", tmp_path / "bare")


@pytest.mark.parametrize("change", [dict(weight=-1.0), dict(weight=float("nan")), dict(kind="l1")])
def test_hidden_state_loss_recipe_refuses_values_out_of_range(change):
    with pytest.raises(ConfigError):
        HiddenStateLossRecipe(**change)
    with pytest.raises(ConfigError, match="top_k"):
        replace(RECIPE, top_k=4)
