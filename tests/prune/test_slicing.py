"""Slicing: a pruned model equals the full one with the removed entries masked, on every axis and on all
together."""

import copy

import pytest
import torch
from compress_models import select

from nanohybrid.model import Layout
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_model, prune_state

LAYOUT = Layout.packed([7, 1, 15])
TOKENS = torch.arange(LAYOUT.tokens) * 7 % 60


def zero(tensor, dimension, selected, size):
    """Zero what is not in `selected` along a dimension."""
    gone = [i for i in range(size) if i not in selected]
    tensor.index_fill_(dimension, torch.tensor(gone, dtype=torch.int64), 0)


@torch.no_grad()
def masked(model, selection):
    """The full model with what goes zeroed by hand, its norms corrected for the zeros they average over."""
    full = copy.deepcopy(model)
    config = model.config
    share = len(selection.hidden) / config.hidden_size

    def correct(norm):
        zero(norm.weight, 0, selection.hidden, config.hidden_size)
        norm.weight.mul_(share**0.5)
        norm.eps *= share

    zero(full.backbone.embeddings.weight, 1, selection.hidden, config.hidden_size)
    correct(full.backbone.norm_f)
    for index in range(len(config.pattern)):
        block = full.backbone.layers[index]
        for name, parameter in block.mixer.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                zero(parameter, 0, selection.hidden, config.hidden_size)
            if index not in selection.layers and parameter.ndim == 2:
                parameter.zero_()
        if index not in selection.layers:
            continue
        correct(block.norm)
        {"M": mask_mamba, "-": mask_ffn, "*": mask_attention}[config.pattern[index]](
            block.mixer, selection.of(index)
        )
    return full


def mask_ffn(mixer, selected):
    zero(mixer.down_proj.weight, 1, selected["intermediate_size"], 48)


def mask_attention(mixer, selected):
    inner = [h * 8 + p for h in selected["num_attention_heads"] for p in range(8)]
    zero(mixer.o_proj.weight, 1, inner, 32)


def mask_mamba(mixer, selected):
    config, heads, channels = mixer.config, selected["mamba_num_heads"], selected["mamba_head_dim"]
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
def test_prune_model_equals_the_masked_model(model, case):
    selection = select(model.config, **case)
    want = masked(model, selection)(TOKENS, layout=LAYOUT)
    got = prune_model(model, selection)(TOKENS, layout=LAYOUT)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize(
    "case",
    [dict(hidden=20), dict(ffn=30), dict(queries=2), dict(layers=[0, 1, 3], hidden=24, ffn=40, queries=2)],
)
def test_prune_model_equals_the_masked_model_for_a_dense_model(dense, case):
    selection = select(dense.config, **case)
    want = masked(dense, selection)(TOKENS, layout=LAYOUT)
    got = prune_model(dense, selection)(TOKENS, layout=LAYOUT)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_prune_model_of_everything_is_a_bitwise_copy(model):
    pruned = prune_model(model, Selection.everything(model.config))
    assert torch.equal(pruned(TOKENS, layout=LAYOUT), model(TOKENS, layout=LAYOUT))
    pruned.backbone.embeddings.weight.data.zero_()
    assert model.backbone.embeddings.weight.abs().sum() > 0


def test_slices_have_the_shapes_of_the_pruned_configuration(model):
    from nanohybrid.model.spec import param_specs

    config, slices = prune_state(model.config, select(model.config, **CASES["everything"]))
    source = model.state_dict()
    assert {n: tuple(s.cut(source[s.source]).shape) for n, s in slices.items()} == {
        n: d.shape for n, d in param_specs(config).items()
    }
