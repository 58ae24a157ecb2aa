"""Selections: their file, the layout of the last release, and what no selection can be."""

import json

import pytest
from compress_models import make_model, select

from nanohybrid.errors import InputError
from nanohybrid.prune.selection import Selection, copy_mask

EVERYTHING = dict(layers=[0, 1, 2, 3, 4, 6], hidden=24, ffn=31, heads=4, channels=6, queries=2)
OLD_NAMES = {"layers", "hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads"}


def test_selection_survives_its_file(model, tmp_path):
    selection = select(model.config, **EVERYTHING)
    selection.write(tmp_path)
    assert Selection.read(tmp_path) == selection
    assert Selection.read(tmp_path / "pruning_mask.json") == selection
    row = json.loads((tmp_path / "pruning_mask.json").read_text())
    assert set(row) == {"layers", "axes"} and isinstance(row["axes"]["mamba_head_dim"], list)
    assert list(row["axes"]["intermediate_size"]) == ["1", "4", "6"]


@pytest.mark.parametrize("case", [EVERYTHING, dict(layers=[1, 3, 4])], ids=["everything", "no Mamba left"])
def test_selection_writes_the_old_layout_and_reads_it_with_one_warning(model, tmp_path, capsys, case):
    selection = select(model.config, **case)
    selection.write(tmp_path)
    row = json.loads((tmp_path / "kept.json").read_text())
    assert set(row) == OLD_NAMES and row["hidden"] == list(selection.hidden)
    assert row["ffn"] == {str(i): list(v) for i, v in selection.axes["intermediate_size"].items()}
    assert row["mamba_channels"] == list(selection.axes.get("mamba_head_dim", {}).get(None, ()))
    (tmp_path / "pruning_mask.json").unlink()
    assert capsys.readouterr().err == ""
    assert Selection.read(tmp_path) == selection
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "kept.json" in warning and "pruning_mask.json" in warning


def test_copy_mask_copies_both_names_and_replaces_only_when_told(model, tmp_path):
    for name, case in (("a", EVERYTHING), ("b", {}), ("c", {})):
        (tmp_path / name).mkdir()
        if name != "c":
            select(model.config, **case).write(tmp_path / name)
    copy_mask(tmp_path / "a", tmp_path / "b")
    copy_mask(tmp_path / "a", tmp_path / "c")
    assert Selection.read(tmp_path / "b") != Selection.read(tmp_path / "a") == Selection.read(tmp_path / "c")
    copy_mask(tmp_path / "a", tmp_path / "b", replace=True)
    for name in ("pruning_mask.json", "kept.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text()


@pytest.mark.parametrize("text", ["[1]", '{"layers": [0]}', '{"layers": 1, "axes": {}}', "{", '{"axes": []}'])
def test_a_file_that_is_no_mask_is_refused(tmp_path, text):
    (tmp_path / "pruning_mask.json").write_text(text)
    with pytest.raises(InputError, match="not a pruning mask"):
        Selection.read(tmp_path)


@pytest.mark.parametrize(
    ("axis", "found", "message"),
    [
        ("hidden_size", {None: (0, 0)}, "hidden_size must be ascending numbers from 0 to 31"),
        ("hidden_size", {None: (0, 32)}, "hidden_size must be ascending"),
        ("intermediate_size", {}, r"intermediate_size is of layers \[\], it must be of \[1, 4, 6\]"),
        ("mamba_head_dim", {0: (1,), 2: (1,), 5: (1,)}, r"it must be of \[None\]"),
        ("mamba_num_heads", {0: (0, 1), 2: (0, 4), 5: (0, 4)}, "layer 0 has unequal numbers in the 2 groups"),
        (
            "mamba_num_heads",
            {0: (0, 4), 2: (0, 1, 4, 5), 5: (0, 4)},
            "mamba_num_heads has unequal numbers in different layers",
        ),
        ("banana", {None: (0,)}, "banana, the axes of this model are hidden_size, intermediate_size"),
    ],
)
def test_selection_config_refuses_what_cannot_be_of_this_model(model, axis, found, message):
    whole = Selection.everything(model.config)
    with pytest.raises(InputError, match=message):
        Selection(whole.layers, {**whole.axes, axis: found}).config(model.config)


def test_selection_config_refuses_no_layers(model):
    with pytest.raises(InputError, match="selection of layers"):
        Selection((), Selection.everything(model.config).axes).config(model.config)


def test_selection_config_keeps_as_many_mamba_heads_in_each_group():
    model = make_model("M", n_groups=4)
    with pytest.raises(InputError, match="4 groups"):
        select(model.config, heads=6).config(model.config)
