"""A pruned model is the full one with what was removed masked: on every axis, and on all together."""

import copy
import json
import random

import pytest
import torch
from compress_models import make_model

from nanohybrid.errors import InputError
from nanohybrid.model import Layout
from nanohybrid.prune.selection import Kept
from nanohybrid.prune.slicing import prune_model, prune_state

LAYOUT = Layout.packed([7, 1, 15])
TOKENS = torch.arange(LAYOUT.tokens) * 7 % 60


def draw(size, keep, groups=1, seed=0):
    """`keep` random indices, as many in each of `groups` runs."""
    rng, run = random.Random(seed), size // groups
    return tuple(sorted(g * run + i for g in range(groups) for i in rng.sample(range(run), keep // groups)))


def kept_of(config, layers=None, hidden=32, ffn=48, heads=8, channels=8, queries=4):
    """Random remains, other ones in every layer."""
    layers = tuple(layers or range(len(config.pattern)))
    at = lambda kind: [i for i in layers if config.pattern[i] == kind]  # noqa: E731
    return Kept(
        layers=layers,
        hidden=draw(32, hidden),
        ffn={i: draw(48, ffn, seed=i) for i in at("-")},
        mamba_heads={i: draw(8, heads, 2, seed=i) for i in at("M")},
        mamba_channels=draw(8, channels) if at("M") else (),
        attention_heads={i: draw(4, queries, 2, seed=i) for i in at("*")},
    )


def zero(tensor, dimension, kept, size):
    """Zero what is not in `kept` along a dimension."""
    gone = [i for i in range(size) if i not in kept]
    tensor.index_fill_(dimension, torch.tensor(gone, dtype=torch.int64), 0)


@torch.no_grad()
def masked(model, kept):
    """The full model with what goes zeroed by hand, its norms corrected for the zeros they average over."""
    full = copy.deepcopy(model)
    config = model.config
    share = len(kept.hidden) / config.hidden_size

    def correct(norm):
        zero(norm.weight, 0, kept.hidden, config.hidden_size)
        norm.weight.mul_(share**0.5)
        norm.eps *= share

    zero(full.backbone.embeddings.weight, 1, kept.hidden, config.hidden_size)
    correct(full.backbone.norm_f)
    for index in range(len(config.pattern)):
        block = full.backbone.layers[index]
        for name, parameter in block.mixer.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                zero(parameter, 0, kept.hidden, config.hidden_size)
            if index not in kept.layers and parameter.ndim == 2:
                parameter.zero_()
        if index not in kept.layers:
            continue
        correct(block.norm)
        {"M": mask_mamba, "-": mask_ffn, "*": mask_attention}[config.pattern[index]](block.mixer, kept, index)
    return full


def mask_ffn(mixer, kept, index):
    zero(mixer.down_proj.weight, 1, kept.ffn[index], 48)


def mask_attention(mixer, kept, index):
    inner = [h * 8 + p for h in kept.attention_heads[index] for p in range(8)]
    zero(mixer.o_proj.weight, 1, inner, 32)


def mask_mamba(mixer, kept, index):
    config, heads, channels = mixer.config, kept.mamba_heads[index], kept.mamba_channels
    inner = [h * config.mamba_head_dim + p for h in heads for p in channels]
    zero(
        mixer.in_proj.weight[: config.mamba_inner_size], 0, inner, config.mamba_inner_size
    )  # z: silu(0) = 0 closes the gate
    share = len(inner) / config.mamba_inner_size
    mixer.norm.weight.mul_(share**0.5)
    mixer.config = config.replace(layer_norm_epsilon=config.layer_norm_epsilon * share)


CASES = {
    "layers": dict(layers=[0, 1, 3, 5, 6]),
    "first and last layer": dict(layers=[1, 2, 3, 4, 5]),
    "embedding": dict(hidden=21),
    "ffn": dict(ffn=29),
    "mamba heads": dict(heads=6),
    "mamba channels": dict(channels=5),
    "attention heads": dict(queries=2),
    "everything": dict(layers=[0, 1, 2, 3, 4, 6], hidden=24, ffn=31, heads=4, channels=6, queries=2),
    "nothing": {},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_sliced_model_is_the_masked_one(model, case):
    kept = kept_of(model.config, **case)
    want, got = masked(model, kept)(TOKENS, layout=LAYOUT), prune_model(model, kept)(TOKENS, layout=LAYOUT)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize(
    "case",
    [dict(hidden=20), dict(ffn=30), dict(queries=2), dict(layers=[0, 1, 3], hidden=24, ffn=40, queries=2)],
)
def test_a_dense_model_prunes_by_the_same_rule(dense, case):
    kept = kept_of(dense.config, **case)
    want, got = masked(dense, kept)(TOKENS, layout=LAYOUT), prune_model(dense, kept)(TOKENS, layout=LAYOUT)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_keeping_everything_is_the_parent_bit_for_bit_and_a_copy(model):
    pruned = prune_model(model, Kept.everything(model.config))
    assert torch.equal(pruned(TOKENS, layout=LAYOUT), model(TOKENS, layout=LAYOUT))
    pruned.backbone.embeddings.weight.data.zero_()
    assert model.backbone.embeddings.weight.abs().sum() > 0


def test_the_slices_have_the_shapes_of_the_new_configuration(model):
    from nanohybrid.model.spec import param_specs

    kept = kept_of(model.config, **CASES["everything"])
    config, slices = prune_state(model.config, kept)
    source = model.state_dict()
    assert {n: tuple(s.cut(source[s.source]).shape) for n, s in slices.items()} == {
        n: d.shape for n, d in param_specs(config).items()
    }


def test_kept_survives_its_file(model, tmp_path):
    kept = kept_of(model.config, **CASES["everything"])
    kept.write(tmp_path)
    assert Kept.read(tmp_path) == kept
    names = {"layers", "hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads"}
    assert set(json.loads((tmp_path / "kept.json").read_text())) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=(0, 0)), "kept.hidden"),
        (dict(hidden=(0, 32)), "kept.hidden"),
        (dict(layers=()), "kept.layers"),
        (dict(ffn={}), "kept.ffn names layers"),
        (dict(mamba_heads={0: (0, 1), 2: (0, 4), 5: (0, 4)}), "unequal numbers in the 2 groups"),
        (dict(mamba_heads={0: (0, 4), 2: (0, 1, 4, 5), 5: (0, 4)}), "unequal numbers in different layers"),
    ],
)
def test_indices_that_cannot_be_of_this_parent_are_refused(model, change, message):
    kept = Kept(**{**vars(Kept.everything(model.config)), **change})
    with pytest.raises(InputError, match=message):
        kept.config(model.config)


def test_pruning_keeps_the_group_of_each_mamba_head():
    model = make_model("M", n_groups=4)
    with pytest.raises(InputError, match="4 groups"):
        kept_of(model.config, heads=6).config(model.config)
