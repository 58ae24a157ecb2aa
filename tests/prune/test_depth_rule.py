"""Which layers go where nothing was measured: the family's rules hold at every depth."""

import json

import pytest
from compress_models import make_model

import nanohybrid
from nanohybrid.checkpoint import load_config, save
from nanohybrid.cli.main import main
from nanohybrid.errors import InputError
from nanohybrid.presets import PRESETS
from nanohybrid.prune.depth_rule import drops_to, layers_to_drop
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_state

TWELVE, NINE = nanohybrid.preset("nano-12b-v2"), nanohybrid.preset("nano-9b-v2")


def remains(pattern, layers):
    gone = layers_to_drop(pattern, layers)
    assert gone == tuple(sorted(set(gone))) and len(gone) == len(pattern) - layers
    return "".join(kind for index, kind in enumerate(pattern) if index not in gone)


def test_depth_rule_from_the_12b_to_56_layers_gives_the_official_9b():
    gone = layers_to_drop(TWELVE.pattern, 56)
    assert (
        sorted(TWELVE.pattern[i] for i in gone) == sorted("**---M")
        and remains(TWELVE.pattern, 56) == NINE.pattern
    )


@pytest.mark.parametrize("layers", [54, 52])
def test_depth_rule_leaves_four_attention_layers_at_54_and_52_layers(layers):
    assert remains(TWELVE.pattern, layers).count("*") == 4


@pytest.mark.parametrize("name", PRESETS)
def test_depth_rule_keeps_first_and_last_layer_and_an_mlp_behind_attention(name):
    pattern = PRESETS[name]["pattern"]
    for layers in range(2, len(pattern) + 1):
        left = remains(pattern, layers)
        assert (left[0], left[-1]) == (pattern[0], pattern[-1])
        if "M" in pattern and layers > 4:
            assert "*M" not in left and "**" not in left and "*" in left


@pytest.mark.parametrize("pattern", ["MMMM", "M", "*-", "-", "M*"])
def test_depth_rule_cuts_unusual_patterns_to_one_layer(pattern):
    assert len(remains(pattern, 1)) == 1
    with pytest.raises(InputError, match="possible are 1"):
        layers_to_drop(pattern, len(pattern) + 1)


def test_drops_to_refuses_a_pattern_that_is_no_subsequence():
    assert drops_to("M-*-", "M*-") == (1,)
    with pytest.raises(InputError, match="cannot be had"):
        drops_to("M-*-", "**")


def test_selection_of_named_layers_and_sizes_turns_the_12b_into_the_9b():
    gone = layers_to_drop(TWELVE.pattern, 56)
    layers = tuple(i for i in range(62) if i not in gone)
    left = Selection.everything(TWELVE).restricted_to(layers, TWELVE)
    ffn = dict.fromkeys(left.axes["intermediate_size"], tuple(range(15_680)))
    narrow = {"hidden_size": {None: tuple(range(4480))}, "intermediate_size": ffn}
    selection = Selection(layers, {**left.axes, **narrow})
    assert selection.config(TWELVE) == NINE and prune_state(TWELVE, selection)[0] == NINE


def test_prune_drop_layers_turns_the_12b_pattern_into_the_9b_pattern(tmp_path, capsys):
    """The same command at a small width: the pattern, and every size that is not pruned, is the 9B's."""
    save(make_model(TWELVE.pattern).float(), tmp_path / "parent")
    drop = ",".join(map(str, layers_to_drop(TWELVE.pattern, 56)))
    assert (
        main(
            [
                "prune",
                str(tmp_path / "parent"),
                "--out",
                str(tmp_path / "out"),
                "--drop-layers",
                drop,
                "--json",
            ]
        )
        == 0
    )
    assert (
        json.loads(capsys.readouterr().out)["pruned"]["pattern"]
        == NINE.pattern
        == load_config(tmp_path / "out").pattern
    )
