"""Recipe keys and flags of the last release work for one release, each with one warning on stderr."""

from pathlib import Path

import pytest

import nanohybrid
from nanohybrid.cli import compress as compress_command
from nanohybrid.cli import distill as distill_command
from nanohybrid.cli import plan_compress as plan_command
from nanohybrid.cli import prune as prune_command
from nanohybrid.cli import quantize as quantize_command
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.prune.stage import PruneRecipe
from nanohybrid.quantize.stage import QuantizeRecipe
from nanohybrid.stages.recipe import load, renamed_keys, with_current_names

OLD = """
device = "a10g"
beside_bytes = 1395864371
samples = 1024
length = 8192
outgoing = false
layers_by = "cosine"
near = 0.02

[grid]
drop_layers = [0, 2]
hidden = [1.0, 0.5]
ffn = [1.0, 0.25]
mamba_heads = [1.0, 0.75]
mamba_channels = [1.0]
attention_heads = [0.5]
tried = 3

[race]
entrants = 3
tokens = 100

[distill]
post_training = 0.6
every_token = true
stretches = [{ until = 1.0, sequence_length = 64 }]

[distill.between]
weight = 0.5

[[after]]
[after.distill]
post_training = 0.8

[after.distill.between]
weight = 0.1
"""
NEW = """
device = "a10g"
reserved_bytes = 1395864371
num_calibration_samples = 1024
max_calibration_length = 8192
scale_by_outgoing_norm = false
depth_importance = "cosine"
quality_tolerance = 0.02

[grid]
drop_layers = [0, 2]
max_evaluated = 3

[grid.fractions]
hidden_size = [1.0, 0.5]
intermediate_size = [1.0, 0.25]
mamba_num_heads = [1.0, 0.75]
mamba_head_dim = [1.0]
num_attention_heads = [0.5]

[successive_halving]
num_candidates = 3
tokens = 100

[distill]
post_training_share = 0.6
train_on_prompt = true
sequence_length_schedule = [{ until = 1.0, sequence_length = 64 }]

[distill.hidden_state_loss]
weight = 0.5

[[post_training]]
[post_training.distill]
post_training_share = 0.8

[post_training.distill.hidden_state_loss]
weight = 0.1
"""


def test_compress_recipe_with_old_keys_equals_the_one_with_new_keys(tmp_path, capsys):
    (tmp_path / "old.toml").write_text(OLD)
    (tmp_path / "new.toml").write_text(NEW)
    recipe = load(CompressRecipe, tmp_path / "new.toml")
    assert capsys.readouterr().err == ""
    assert load(CompressRecipe, tmp_path / "old.toml") == recipe != CompressRecipe()
    assert recipe.grid.fractions["intermediate_size"] == (1.0, 0.25)
    assert recipe.post_training[0].distill.hidden_state_loss.weight == 0.1
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(set(warnings)) == 21 and all("until the next release" in w for w in warnings)
    assert any("race is now successive_halving" in w for w in warnings)
    assert any("grid.ffn is now grid.fractions.intermediate_size" in w for w in warnings)


def test_stored_prune_recipe_with_old_keys_equals_the_one_with_new_keys():
    old = {
        "target": {"hidden_size": 24, "mamba_heads": 4, "drop_layers": [1]},
        "samples": 8,
        "outgoing": True,
    }
    new, used = with_current_names(PruneRecipe, old)
    assert new == {
        "target": {"drop_layers": [1], "sizes": {"hidden_size": 24, "mamba_num_heads": 4}},
        "num_calibration_samples": 8,
        "scale_by_outgoing_norm": True,
    }
    assert used["target.mamba_heads"] == "target.sizes.mamba_num_heads"
    assert renamed_keys(QuantizeRecipe)["length"] == "max_calibration_length"


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (
            compress_command,
            ["--race.entrants", "2", "--race.tokens", "7", "--layers_by", "cosine", "--beside-gib", "1"],
            [
                "--successive-halving.num-candidates",
                "2",
                "--successive-halving.tokens",
                "7",
                "--depth-importance",
                "cosine",
                "--reserved-gib",
                "1",
            ],
        ),
        (
            compress_command,
            ["--grid.hidden", "[1.0, 0.5]", "--grid.ffn=[0.5]", "--distill.between.weight", "1"],
            [
                "--grid.fractions.hidden_size",
                "[1.0, 0.5]",
                "--grid.fractions.intermediate_size=[0.5]",
                "--distill.hidden-state-loss.weight",
                "1",
            ],
        ),
        (
            distill_command,
            ["--data", "D", "--every_token", "true", "--between.kind", "cosine", "--post_training", "0.5"],
            [
                "--data",
                "D",
                "--train-on-prompt",
                "true",
                "--hidden-state-loss.kind",
                "cosine",
                "--post-training-share",
                "0.5",
            ],
        ),
        (
            prune_command,
            ["--samples", "3", "--length", "9", "--layers-by", "cosine", "--plain"],
            [
                "--num-calibration-samples",
                "3",
                "--max-calibration-length",
                "9",
                "--depth-importance",
                "cosine",
                "--no-outgoing-norm",
            ],
        ),
        (
            quantize_command,
            ["--to", "int8", "--samples", "3", "--length", "9"],
            ["--to", "int8", "--num-calibration-samples", "3", "--max-calibration-length", "9"],
        ),
        (plan_command, ["--beside-gib", "1"], ["--reserved-gib", "1"]),
    ],
    ids=["compress", "compress grid", "distill", "prune", "quantize", "plan compress"],
)
def test_old_flags_parse_as_the_new_ones_with_a_warning_each(command, old, new, capsys):
    paths = ["P", "Q"] if command is distill_command else ["P"]
    out = [] if command is plan_command else ["--out", "O"]
    parsed = []
    for flags in (old, new):
        parser = command.parser()
        parsed.append(parser.instantiate(parser.parse_args([*paths, *out, *flags])))
        warnings = capsys.readouterr().err.splitlines()
        renamed = {flag.partition("=")[0] for flag in old if flag.startswith("--")} - set(new)
        assert len(warnings) == (len(renamed) if flags is old else 0)
    if command is compress_command:
        assert parsed[0].grid == parsed[1].grid and parsed[0].distill == parsed[1].distill
    assert parsed[0].as_dict() == parsed[1].as_dict()


def test_recipes_of_the_package_use_no_old_key(capsys):
    folder = Path(nanohybrid.__file__).parent / "recipes"
    for name in ("tiny/compress", "small/compress/compress", "small/compress/align", "nano-12b-v2/compress"):
        load(CompressRecipe, folder / f"{name}.toml")
    load(DistillRecipe, folder / "tiny" / "distill.toml")
    assert capsys.readouterr().err == ""
