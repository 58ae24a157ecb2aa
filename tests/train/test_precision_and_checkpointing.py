"""FP8 applies to the inner layers only, and activation checkpointing does not change the gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.errors import ConfigError
from nanohybrid.model import HybridLM
from nanohybrid.train import PrecisionConfig, next_token_loss
from nanohybrid.train.checkpointing import checkpointed
from nanohybrid.train.precision import FP8Linear, autocast, fp8_linears

CPU = torch.device("cpu")


def gradients(model: HybridLM, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    loss, _ = next_token_loss(model, batch)
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_fp8_linears_replaces_the_inner_layers_only_and_keeps_parameter_names(config: HybridConfig) -> None:
    model = HybridLM(config, seed=0)
    names = [name for name, _ in model.named_parameters()]
    with fp8_linears(model.backbone.layers, 1) as count:
        inside = {name for name, module in model.named_modules() if isinstance(module, FP8Linear)}
        assert [name for name, _ in model.named_parameters()] == names
    assert count == len(inside) == 4 + 2 + 2  # attention, MLP, Mamba of layers 1 to 3
    assert {name.split(".")[2] for name in inside} == {"1", "2", "3"}
    assert not any(isinstance(module, FP8Linear) for module in model.modules())


def test_fp8_linears_gives_gradients_close_to_bf16_but_not_equal(
    config: HybridConfig, batches: Callable[[int], Batch]
) -> None:
    model = HybridLM(config, seed=0)
    with autocast("bf16", CPU):
        plain = gradients(model, batches(0))
        with fp8_linears(model.backbone.layers, 0):
            rounded = gradients(model, batches(0))
    assert plain.keys() == rounded.keys()
    flat, other = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (plain, rounded))
    assert torch.cosine_similarity(flat, other, dim=0) > 0.95 and 0.9 < other.norm() / flat.norm() < 1.1
    assert any(not torch.equal(rounded[name], expected) for name, expected in plain.items())


def test_fp8_linears_refuses_a_model_without_inner_layers(config: HybridConfig) -> None:
    model = HybridLM(config)
    with pytest.raises(ConfigError, match="lower bf16_layers"), fp8_linears(model.backbone.layers, 3):
        pass


def test_precision_switches_from_fp8_to_bf16_at_fp8_until() -> None:
    precision = PrecisionConfig("fp8", fp8_until=0.8)
    assert [precision.mode_at(step, 10) for step in (0, 7, 8, 9)] == ["fp8", "fp8", "bf16", "bf16"]
    assert PrecisionConfig("fp32").mode_at(9, 10) == "fp32"


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_layers_give_the_same_gradients(
    config: HybridConfig, batches: Callable[[int], Batch], every: int
) -> None:
    model = HybridLM(config, seed=0)
    plain = gradients(model, batches(0))
    with checkpointed(model.backbone.layers, every):
        again = gradients(model, batches(0))
    assert (
        all(torch.equal(again[name], expected) for name, expected in plain.items())
        and plain.keys() == again.keys()
    )
    assert all("forward" not in vars(layer) for layer in model.backbone.layers)
