"""How parameters begin."""

import math

import torch
import torch.nn.functional as F

import nanohybrid
from nanohybrid.model import HybridLM


def test_the_same_seed_gives_the_same_model(config):
    first, second, other = HybridLM(config, seed=3), HybridLM(config, seed=3), HybridLM(config, seed=4)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_parameters_begin_as_the_familys_do():
    config = nanohybrid.preset("tiny")
    model = HybridLM(config, seed=0)
    mixer, mlp = model.backbone.layers[0].mixer, model.backbone.layers[1].mixer
    rates = mixer.A_log.exp()
    assert rates.min() >= 1 and rates.max() <= 16
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= config.time_step_min * 0.999 and steps.max() <= config.time_step_max * 1.001
    assert (
        (mixer.D == 1).all() and (mixer.norm.weight == 1).all() and (model.backbone.norm_f.weight == 1).all()
    )
    assert mixer.conv1d.weight.abs().max() <= config.conv_kernel**-0.5
    assert math.isclose(mlp.up_proj.weight.std().item(), config.initializer_range, rel_tol=0.02)
    residual = config.initializer_range / math.sqrt(config.num_hidden_layers)
    assert math.isclose(mlp.down_proj.weight.std().item(), residual, rel_tol=0.02)
    assert math.isclose(model.head_weight.std().item(), config.initializer_range, rel_tol=0.02)
    plain = HybridLM(config.replace(rescale_prenorm_residual=False), seed=0)
    assert math.isclose(
        plain.backbone.layers[1].mixer.down_proj.weight.std().item(), config.initializer_range, rel_tol=0.02
    )


def test_a_model_can_be_made_without_memory():
    with torch.device("meta"):
        model = HybridLM(nanohybrid.preset("nano-12b-v2"))
    assert all(parameter.is_meta for parameter in model.parameters())
