"""Kinds of layers that a user registers are pruned, scored, searched and reported by what they declare."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from compress_models import make_model, write_parent
from torch import Tensor, nn

from nanohybrid.checkpoint import CheckpointReader, load, save
from nanohybrid.cli.main import main
from nanohybrid.compress.plan import plan
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid, enumerate_shapes, key_of
from nanohybrid.compress.stage import compress
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.estimate.budget import Budget
from nanohybrid.estimate.devices import device
from nanohybrid.model import Layout
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers import (
    MIXERS,
    Attention,
    CacheSpec,
    InnerActivation,
    LayerFields,
    Mixer,
    MixerSpec,
    PrunableAxis,
    register,
)
from nanohybrid.model.mixers.axes import Outer
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.baselines import magnitude, random
from nanohybrid.prune.depth_rule import layers_to_drop
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import ImportanceLoss
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.measure import importance_of
from nanohybrid.prune.prunable import known_axes, prunable_axes
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_model
from nanohybrid.prune.target import Target

LAYOUT = Layout.packed([7, 1, 15])
TOKENS = torch.arange(LAYOUT.tokens) * 7 % 60
PATTERN = "MW*-R-W"


class LocalAttention(Attention):
    """A kind of attention of its own; it shares the heads' axis with `*`."""

    symbol = "W"
    label = "local attention"
    color = "#aa00aa"

    def forward(self, x_TE: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        return 0.5 * super().forward(x_TE, layout, cache)


@dataclass(frozen=True, kw_only=True)
class DecayFields(LayerFields):
    decay_heads: int = 6
    decay_groups: int = 3
    decay_width: int = 5


class Decay(Mixer[DecayFields]):
    """A recurrence of its own: each head is a decayed sum of its inputs, with a gate that its group
    shares."""

    symbol = "R"
    label = "decay"
    color = "#00aaaa"
    fields = DecayFields
    prunable = (
        PrunableAxis("decay_heads", "--decay-heads", "decay heads", groups="decay_groups"),
        PrunableAxis("decay_width", "--decay-width", "channels of a decay head", shared=True),
    )
    activation = InnerActivation("mix", "input", ("decay_heads", "decay_width"), writer="mix")

    read: nn.Linear
    mix: nn.Linear
    rate: Tensor

    PARAMETERS: ClassVar = {
        "read.weight": (Outer("decay_heads", "decay_width"), "hidden_size"),
        "mix.weight": ("hidden_size", Outer("decay_heads", "decay_width")),
        "rate": ("decay_heads",),
    }

    @classmethod
    def declare(cls, config: DecayFields) -> MixerSpec:
        state = CacheSpec(("decay_heads", "decay_width"), "recurrent", torch.float32)
        return MixerSpec(cls.PARAMETERS, cache={"state": state})

    def forward(self, x_TE: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        config, rows = self.config, []
        x_THP = self.read(x_TE).unflatten(-1, (config.decay_heads, config.decay_width))
        for piece in x_THP.split(list(layout.lengths)):
            state = torch.zeros_like(piece[0])
            for x_HP in piece:
                state = state * torch.sigmoid(self.rate)[:, None] + x_HP
                rows.append(state)
        return self.mix(torch.stack(rows).flatten(-2))


@pytest.fixture(autouse=True)
def kinds():
    register(LocalAttention)
    register(Decay)
    yield
    for symbol in "WR":
        MIXERS.pop(symbol)


@pytest.fixture
def hybrid():
    model = make_model(PATTERN)
    with torch.no_grad():
        for layer, kind in enumerate(PATTERN):
            if kind == "R":
                model.backbone.layers[layer].mixer.rate.copy_(torch.linspace(-1, 2, 6))
    return model


@pytest.fixture
def scores(hybrid, calibration):
    return measure_activations(hybrid, calibration)


def zeroed(model, layer, name, selected, size, run):
    """Zero the columns of a layer's output matrix that belong to entries which go."""
    gone = [entry * run + i for entry in range(size) if entry not in selected for i in range(run)]
    with torch.no_grad():
        model.backbone.layers[layer].mixer.get_parameter(name)[:, gone] = 0


def test_heads_of_a_registered_attention_are_pruned_exactly_together_with_those_of_attention(hybrid, scores):
    selection = Target(sizes={"num_attention_heads": 2}).select(hybrid.config, scores)
    heads = selection.axes["num_attention_heads"]
    assert list(heads) == [1, 2, 6]
    pruned = prune_model(hybrid, selection)
    for layer, selected in heads.items():
        assert [head // 2 for head in selected] == [0, 1]  # as many for each key/value head
        zeroed(hybrid, layer, "o_proj.weight", selected, 4, 8)
    torch.testing.assert_close(pruned(TOKENS, LAYOUT), hybrid(TOKENS, LAYOUT), rtol=1e-9, atol=1e-9)


def test_a_registered_recurrence_is_pruned_exactly_on_both_of_its_axes(hybrid, scores):
    selection = Target(sizes={"decay_heads": 3, "decay_width": 2}).select(hybrid.config, scores)
    (channels,) = selection.axes["decay_width"].values()
    heads = selection.axes["decay_heads"][4]
    assert [head // 2 for head in heads] == [0, 1, 2] and len(channels) == 2
    pruned = prune_model(hybrid, selection)
    assert (pruned.config.decay_heads, pruned.config.decay_width) == (3, 2)
    remaining = [head * 5 + channel for head in heads for channel in channels]
    zeroed(hybrid, 4, "mix.weight", remaining, 30, 1)
    torch.testing.assert_close(pruned(TOKENS, LAYOUT), hybrid(TOKENS, LAYOUT), rtol=1e-9, atol=1e-9)


def test_scores_of_a_registered_kind_are_what_its_writer_reads(hybrid, calibration):
    found = measure_activations(hybrid, calibration, scale_by_outgoing_norm=False)
    assert found.axes[4] == ("decay_heads", "decay_width") and found.scores[4].shape == (6, 5)
    seen = []
    hook = hybrid.backbone.layers[4].mixer.mix.register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0])
    )
    for tokens, _ in calibration.samples:
        hybrid(torch.from_numpy(tokens).long(), Layout.packed([len(tokens)]))
    hook.remove()
    want = torch.stack([a_TD.detach().abs().mean(0) for a_TD in seen]).norm(dim=0)
    torch.testing.assert_close(found.scores[4].flatten().double(), want, rtol=1e-5, atol=1e-7)
    assert set(found.facts["stability"]) >= {"decay_heads", "decay_width", "num_attention_heads"}


def test_scores_of_registered_kinds_survive_their_file_and_are_measured_from_disk(
    hybrid, scores, calibration, tmp_path
):
    scores.save(tmp_path)
    back = Importance.load(tmp_path)
    back.check(hybrid.config)
    assert back.axes == scores.axes
    save(hybrid.float(), tmp_path / "model")
    with CheckpointReader(tmp_path / "model") as reader:
        streamed = measure_activations(StreamedModel(reader), calibration)
    for layer, of in scores.scores.items():
        torch.testing.assert_close(streamed.scores[layer], of, rtol=1e-4, atol=1e-5)
    ranked = importance_of(tmp_path / "model", calibration, tmp_path / "ranked", True, 3)
    assert sorted(ranked.order) == list(range(7))
    norms = magnitude(tmp_path / "model")
    mixer = hybrid.backbone.layers[4].mixer
    want = mixer.read.weight.square().sum(1) + mixer.mix.weight.square().sum(0)
    torch.testing.assert_close(norms.scores[4].flatten(), want.sqrt().detach())
    assert random(hybrid.config, 0).axes == scores.axes


def test_prunable_axes_are_those_of_the_pattern_and_of_the_registry():
    assert list(prunable_axes("-W")) == ["hidden_size", "intermediate_size", "num_attention_heads"]
    assert {"decay_heads", "decay_width"} <= set(known_axes())


def test_search_and_plan_enumerate_the_axes_of_registered_kinds(hybrid, scores):
    config = hybrid.config
    grid = Grid(fractions={"hidden_size": (1.0, 0.5), "decay_heads": (1.0, 0.5), "decay_width": (1.0, 0.4)})
    found = enumerate_shapes(config, scores, grid, Budget(10**9, 64)).candidates
    assert {(c.config.decay_heads, c.config.decay_width) for c in found} == {(6, 5), (3, 5), (6, 2), (3, 2)}
    smallest = min(found, key=lambda c: c.parameters)
    assert smallest.as_dict()["config"]["decay_width"] == 2
    assert key_of(smallest).split("-")[0] == "7"
    proxy = ImportanceLoss(config, scores)
    both = Target(sizes={"decay_heads": 3, "decay_width": 2})
    axes = both.select(config, scores).axes
    energy = scores.scores[4].double().square()
    left = energy[list(axes["decay_heads"][4])][:, list(axes["decay_width"][None])].sum() / energy.sum()
    assert proxy.of(both) == pytest.approx(1 - float(left))
    shapes = plan(
        config, Budget(10**9, 64), device("cpu"), None, Grid(drop_layers=(0, 2), fractions=grid.fractions)
    )
    assert {shape.config.num_hidden_layers for shape in shapes.shapes} == {7}
    assert "no layers go" in shapes.estimate


def test_depth_rule_refuses_a_registered_kind_in_one_line():
    with pytest.raises(InputError, match=r"layers W \(local attention\); rank them by measured importance"):
        layers_to_drop(PATTERN, 5)


def test_an_axis_that_another_kind_has_and_does_not_prune_is_refused(hybrid, scores, monkeypatch):
    monkeypatch.setattr(LocalAttention, "prunable", ())
    with pytest.raises(
        InputError, match=r"num_attention_heads cannot be pruned .* layers W \(local attention\)"
    ):
        Target(sizes={"num_attention_heads": 2}).check(hybrid.config)
    whole = Selection.everything(hybrid.config)
    fewer = {**whole.axes, "num_attention_heads": {2: (0, 2)}}
    with pytest.raises(InputError, match="cannot be pruned"):
        Selection(whole.layers, fewer).config(hybrid.config)


def test_an_axis_that_the_activation_lacks_is_refused(hybrid, monkeypatch):
    monkeypatch.setattr(Decay, "activation", InnerActivation("mix", "input", ("decay_heads",), writer="mix"))
    with pytest.raises(ConfigError, match=r"Decay: .* decay_width cannot be scored"):
        prunable_axes(PATTERN)


def test_pruning_to_fewer_layers_drops_the_fields_of_a_kind_that_is_gone(hybrid, scores):
    target = Target(drop_layers=(4,), sizes={"decay_heads": 3, "hidden_size": 24})
    assert not hasattr(target.config(hybrid.config, scores), "decay_heads")
    selection = target.select(hybrid.config, scores)
    assert "decay_heads" not in selection.axes
    assert prune_model(hybrid, selection).config == target.config(hybrid.config, scores)


def test_prune_command_has_a_flag_for_each_axis_of_a_registered_kind(tmp_path, capsys):
    root = write_parent(tmp_path, pattern=PATTERN)
    words = [
        "prune",
        str(root / "parent"),
        "--calibration",
        str(root / "sft"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--decay-heads", "3", "--attention-heads", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parent"]["decay_heads"] == 6 and told["pruned"]["decay_heads"] == 3
    config = load(tmp_path / "out").config
    assert (config.decay_heads, config.num_attention_heads) == (3, 2)
    mask = json.loads((tmp_path / "out" / "pruning_mask.json").read_text())
    assert set(mask["axes"]["num_attention_heads"]) == {"1", "2", "6"}
    assert not (tmp_path / "out" / "kept.json").exists()  # which has no name for decay_heads
    assert main([*words, "--decay-heads", "4", "--out", str(tmp_path / "no")]) == 2
    assert "nearest 3 or 6" in capsys.readouterr().err


def test_compress_searches_distills_and_reports_registered_kinds(tmp_path):
    from nanohybrid.distill.recipe import DistillRecipe
    from nanohybrid.train import LoopConfig, PrecisionConfig

    root = write_parent(tmp_path, pattern=PATTERN)
    grid = Grid(multiple=4, max_evaluated=2, fractions={"decay_heads": (1.0, 0.5), "mamba_head_dim": (1.0,)})
    distill = DistillRecipe(
        tokens=200, batch_tokens=100, sequence_length=40, measured_tokens=100,
        precision=PrecisionConfig("fp32"), loop=LoopConfig(log_steps=1),
    )  # fmt: skip
    recipe = CompressRecipe(
        budget_share=0.8,
        context=64,
        num_calibration_samples=6,
        max_calibration_length=30,
        distill=distill,
        grid=grid,
    )
    out = compress(recipe, root / "parent", root / "sft", tmp_path / "out")
    page = (out / "report.html").read_text()
    assert "decay heads" in page and "local attention" in page
    assert load(out).config.pattern == PATTERN
    assert Selection.read(out).config(load(root / "parent").config) == load(out).config
