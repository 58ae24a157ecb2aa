"""The stages of alignment after distillation: run in order, each what it is on its own, and refused before
any work."""

import json
from dataclasses import replace

import pytest
import torch
from compress_models import make_model, write_parent

from nanohybrid.align import GrpoRecipe, MergeRecipe, SftRecipe, grpo, sft
from nanohybrid.align.chats import ChatShares
from nanohybrid.align.rollouts import SamplingConfig
from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.compress.post_training import PostTrainingRecipe
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.distill.hidden_state_loss import HiddenStateLossRecipe
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.errors import ConfigError
from nanohybrid.stages.fingerprint import fingerprint
from nanohybrid.stages.recipe import dump
from nanohybrid.stages.recipe import load as load_recipe
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

LEARNED = {
    "optimizer": OptimizerConfig(learning_rate=1e-2),
    "precision": PrecisionConfig("fp32"),
    "loop": LoopConfig(log_steps=1),
}
DISTILL = DistillRecipe(tokens=200, batch_tokens=100, sequence_length=40, measured_tokens=100, **LEARNED)
SFT = SftRecipe(("parity",), ChatShares(text=0.0), 200, 100, 60, **LEARNED)
GRPO = GrpoRecipe(
    ("parity",),
    (4,),
    rollout_steps=1,
    prompts=2,
    num_generations=2,
    sampling=SamplingConfig(max_tokens=4),
    eval_problems=2,
    warmup_steps=0,
    beta=0.1,
    **LEARNED,
)
ONCE_MORE = replace(
    DISTILL, hidden_state_loss=HiddenStateLossRecipe(weight=0.1), seed=1
)  # this loss reads the pruning mask
AFTER = (
    PostTrainingRecipe(sft=SFT),
    PostTrainingRecipe(grpo=GRPO),
    PostTrainingRecipe(distill=ONCE_MORE),
    PostTrainingRecipe(merge=MergeRecipe(0.25)),
)
RECIPE = CompressRecipe(
    budget_share=0.6,
    context=64,
    num_calibration_samples=8,
    max_calibration_length=30,
    distill=DISTILL,
    quantize="int8",
    post_training=AFTER,
    grid=Grid(
        multiple=4,
        max_evaluated=1,
        fractions={"hidden_size": (1.0,), "intermediate_size": (1.0, 0.5), "mamba_head_dim": (1.0, 0.5)},
    ),
)
NAMES = ["1-sft", "2-grpo", "3-distill", "4-merge"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A parent with a tokenizer, and documents."""
    return write_parent(tmp_path_factory.mktemp("after"))


def command(folders, recipe, out):
    (folders / "recipe.toml").write_text(recipe if isinstance(recipe, str) else dump(recipe))
    data, path = str(folders / "sft"), str(folders / "recipe.toml")
    return ["compress", str(folders / "parent"), "--recipe", path, "--data", data, "--out", str(out)]


@pytest.fixture(scope="module")
def out(folders):
    assert main(command(folders, RECIPE, folders / "small")) == 0
    return folders / "small"


def weights(folder):
    return load(folder).state_dict()


def test_post_training_stages_equal_their_commands(folders, out, tmp_path):
    """From where the one before left it: the same bytes as by hand."""
    folder = out / "aligned"
    by_hand = {
        "1-sft": lambda to: sft(SFT, out / "distilled", to),
        "2-grpo": lambda to: grpo(GRPO, folder / "1-sft", to),
        "3-distill": lambda to: distill(
            ONCE_MORE, folder / "2-grpo", folders / "parent", folders / "sft", to
        ),
    }
    before = (out / "distilled" / "model.safetensors").read_bytes()
    for name, run in by_hand.items():
        made = (folder / name / "model.safetensors").read_bytes()
        assert (run(tmp_path / name) / "model.safetensors").read_bytes() == made
        assert made != before
        before = made


def test_post_training_merge_averages_the_last_two_models(out):
    first, second, merged = (weights(out / "aligned" / name) for name in ("2-grpo", "3-distill", "4-merge"))
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor, (0.75 * first[name].float() + 0.25 * second[name].float()).to(tensor.dtype)
        )


def test_compress_quantizes_evaluates_and_reports_the_last_post_training_stage(out):
    record = json.loads((out / "lineage.json").read_text())
    assert list(record["measures"]["losses"]) == ["parent", "pruned", "distilled", *NAMES, "quantized"]
    made = json.loads((out / "quantized" / "lineage.json").read_text())
    assert made["inputs"]["model"] == fingerprint(out / "aligned" / "4-merge")
    stages = record["measures"]["post_training"]
    assert [stage["name"] for stage in stages] == NAMES
    assert (
        stages[0]["final_loss"] > 0
        and 0 <= stages[1]["accuracy_after"] <= 1
        and stages[2]["kl_after"] > 0
        and stages[3]["weight"] == 0.25
    )
    tokens = [
        json.loads((out / place / "lineage.json").read_text())["tokens"]
        for place in ("distilled", *(f"aligned/{n}" for n in NAMES))
    ]
    assert record["tokens"] == sum(tokens) and min(tokens[:4]) > 0
    for name in NAMES:
        for mask in ("pruning_mask.json", "kept.json"):
            assert (out / "aligned" / name / mask).read_bytes() == (out / mask).read_bytes()
    page = (out / "report.html").read_text()
    assert all(f">{name}<" in page for name in NAMES)
    assert "Post-training followed: sft, grpo, distill, merge." in page
    assert "75% of the model before the last stage, 25% of the one after it" in page


def test_compress_skips_post_training_where_nothing_was_pruned(folders, tmp_path, capsys):
    whole = replace(RECIPE, budget_share=1.0, quantize=None, post_training=(PostTrainingRecipe(sft=SFT),))
    assert main(command(folders, whole, tmp_path / "whole")) == 0
    assert not (tmp_path / "whole" / "aligned").exists()
    measures = json.loads((tmp_path / "whole" / "lineage.json").read_text())["measures"]
    assert list(measures["losses"]) == ["parent"] and "post_training" not in measures


def test_post_training_recipe_is_read_from_toml_tables(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        "[[post_training]]\n[post_training.grpo]\nrollouts = "
        "3\n[[post_training]]\n[post_training.merge]\nweight = 0.4\n"
    )
    assert load_recipe(CompressRecipe, tmp_path / "recipe.toml").post_training == (
        PostTrainingRecipe(grpo=GrpoRecipe(rollout_steps=3)),
        PostTrainingRecipe(merge=MergeRecipe(0.4)),
    )
    (tmp_path / "again.toml").write_text(dump(RECIPE))
    assert load_recipe(CompressRecipe, tmp_path / "again.toml") == RECIPE


def test_post_training_entry_must_be_exactly_one_stage():
    with pytest.raises(ConfigError, match="names none: it must be one of sft, grpo, distill, merge"):
        PostTrainingRecipe()
    with pytest.raises(ConfigError, match="names sft and merge"):
        PostTrainingRecipe(sft=SFT, merge=MergeRecipe())
    with pytest.raises(ConfigError, match="begins with merge"):
        CompressRecipe(post_training=(PostTrainingRecipe(merge=MergeRecipe()),))


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("[[post_training]]\n[post_training.sft]\ntokens = 100\n", "give --pretraining DIR"),
        ('[[post_training]]\n[post_training.grpo]\ntasks = ["alchemy"]\n', "alchemy"),
        (
            '[[post_training]]\n[post_training.grpo]\ntasks = ["parity"]\ndifficulties = [2]\n',
            "parity has difficulties 4 to 12",
        ),
        (
            "[[post_training]]\n[post_training.distill.hidden_state_loss]\nweight = 0.1\nlayers = [77]\n",
            "hidden_state_loss.layers names 77",
        ),
        ("[[post_training]]\n[post_training.grpo]\nrollout = 1\n", "rollout"),
        ("[[post_training]]\n", "post_training: expected a table of PostTrainingRecipe, got {}"),
        ("[[post_training]]\n[post_training.merge]\n[post_training.distill]\n", "names distill and merge"),
        ("[[post_training]]\n[post_training.merge]\n", "begins with merge"),
    ],
)
def test_compress_refuses_impossible_post_training_before_any_work(folders, tmp_path, capsys, after, said):
    assert main(command(folders, after, tmp_path / "out")) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_compress_refuses_sft_for_a_model_without_a_tokenizer(folders, tmp_path, capsys):
    save(make_model(vocab_size=269).float(), tmp_path / "bare")
    words = command(folders, RECIPE, tmp_path / "out")
    words[1] = str(tmp_path / "bare")
    assert main(words) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()
