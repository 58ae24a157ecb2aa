"""The stage `distill`: its loss, its mixture, and that a student comes nearer to its teacher."""

import json
from dataclasses import replace

import numpy as np
import pytest
from compress_models import make_model, write_folders

from nanohybrid.checkpoint import CheckpointReader, load, save
from nanohybrid.cli.main import main
from nanohybrid.data import Batch
from nanohybrid.distill.loader import DistillLoader, evaluation_batches, mixture
from nanohybrid.distill.losses import kl_loss, mean_kl
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.errors import InputError
from nanohybrid.stages.recipe import dump
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("distill"))


def test_kl_loss_equals_the_divergence_of_whole_logits(model):
    other = make_model("M-*-")
    batch = Batch.of([(np.arange(20, 33), np.r_[np.zeros(4), np.ones(9)]), (np.arange(40, 47), np.ones(7))])
    total, count = kl_loss(model, 2.0, train_on_prompt=False)(other, batch)
    logp = [(m(batch.tokens_T, layout=batch.layout) / 2.0).log_softmax(-1) for m in (model, other)]
    kl = 4.0 * (logp[0].exp() * (logp[0] - logp[1])).sum(-1)[batch.targets_T != -100]
    assert count == len(kl) == 9 + 6
    assert total.item() == pytest.approx(kl.sum().item(), rel=1e-5)
    assert kl_loss(model, 2.0, train_on_prompt=True)(other, batch)[1] == 20
    assert mean_kl(model, model, [batch]) == pytest.approx(0.0, abs=1e-6)


def test_mixture_weights_post_training_and_pretraining_70_to_30(folders):
    stores, weights = mixture(DISTILL, folders / "sft", folders / "data")
    assert set(stores) == {"post-chats", "pre-web", "pre-code"} and weights["post-chats"] == pytest.approx(
        0.7
    )
    assert (
        weights["pre-web"] + weights["pre-code"] == pytest.approx(0.3)
        and weights["pre-code"] > weights["pre-web"]
    )
    assert mixture(DISTILL, folders / "sft", None)[1] == {"post-chats": 1.0}


def test_distill_lowers_the_divergence(folders, tmp_path):
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


def test_distill_command_takes_a_quantized_teacher(folders, tmp_path, capsys):
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


def test_distill_refuses_models_with_other_vocabularies(folders, tmp_path):
    save(make_model().float(), tmp_path / "student")
    with pytest.raises(InputError, match="vocabulary of 60"):
        distill(DISTILL, tmp_path / "student", folders / "parent", folders / "sft", tmp_path / "out")


def test_distill_writes_the_dtypes_of_the_student_and_measures_what_it_writes(folders, tmp_path):
    """A student of a bf16 parent was written in fp32, and so was larger than its parent."""
    model = load(folders / "parent")
    save(model.bfloat16(), tmp_path / "student", assets=folders / "parent")
    recipe = replace(DISTILL, tokens=200)
    out = distill(recipe, tmp_path / "student", folders / "parent", folders / "sft", tmp_path / "out")
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "student", out)]
    assert sizes[0] == sizes[1]
    with CheckpointReader(tmp_path / "student") as before, CheckpointReader(out) as after:
        names = before.names()
        assert {name: after.dtype(name) for name in names} == {name: before.dtype(name) for name in names}
    measures = json.loads((out / "lineage.json").read_text())["measures"]
    stores, weights = mixture(recipe, folders / "sft", None)
    held_out = evaluation_batches(recipe, folders / "sft", DistillLoader(recipe, stores, weights))
    both = [load(path, dtype="fp32") for path in (out, folders / "parent")]
    assert mean_kl(*both, held_out) == pytest.approx(measures["kl_after"], rel=1e-6)
