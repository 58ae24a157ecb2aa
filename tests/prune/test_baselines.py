"""Pruning by the size of weights and by chance: what importance is compared with."""

import torch
from compress_models import make_model

from nanohybrid.checkpoint import save
from nanohybrid.prune.baselines import magnitude, random
from nanohybrid.prune.target import Target


def test_magnitude_is_the_norm_of_all_weights_that_read_or_write_an_entry(tmp_path):
    model = make_model()
    config = model.config
    save(model, tmp_path)
    found, state = magnitude(tmp_path), {k: v.float() for k, v in model.state_dict().items()}
    mlp, mamba, attention = (config.pattern.index(kind) for kind in "-M*")
    at = lambda layer, name: state[f"backbone.layers.{layer}.mixer.{name}.weight"]  # noqa: E731
    ffn_F = (at(mlp, "up_proj").square().sum(1) + at(mlp, "down_proj").square().sum(0)).sqrt()
    torch.testing.assert_close(found.scores[mlp], ffn_F)
    inner, heads, channels = config.mamba_inner_size, config.mamba_num_heads, config.mamba_head_dim
    rows, conv, out = (
        at(mamba, "in_proj").square().sum(1),
        at(mamba, "conv1d").square().sum((1, 2)),
        at(mamba, "out_proj").square().sum(0),
    )
    inner_D = (rows[:inner] + rows[inner : 2 * inner] + conv[:inner] + out).sqrt()
    torch.testing.assert_close(found.scores[mamba], inner_D.view(heads, channels))
    queries = at(attention, "q_proj").square().sum(1) + at(attention, "o_proj").square().sum(0)
    torch.testing.assert_close(
        found.scores[attention], queries.view(config.num_attention_heads, -1).sum(1).sqrt()
    )
    writers = (
        "out_proj.weight",
        "down_proj.weight",
        "o_proj.weight",
    )  # their rows are embedding channels, other matrices' columns
    touching = [
        t.square().sum(1 if name.endswith(writers) else 0) for name, t in state.items() if t.ndim == 2
    ]
    torch.testing.assert_close(found.hidden_size, torch.stack(touching).sum(0).sqrt())


def test_random_scores_depend_on_the_seed_alone(model):
    target, config = (
        Target(
            layers=model.config.num_hidden_layers - 1, sizes={"hidden_size": model.config.hidden_size // 2}
        ),
        model.config,
    )
    chosen = [target.select(config, random(config, seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1]
    assert chosen[0].hidden != chosen[2].hidden
