"""What the layers declare is what there is: shapes, counts, bytes, pruning slices."""

import pytest
import torch

import nanohybrid
from nanohybrid.estimate import Footprint
from nanohybrid.model import HybridCache, HybridLM
from nanohybrid.model.mixers.axes import Outer, Stack, axis_sizes, names, selected_index, size
from nanohybrid.model.spec import param_specs

PUBLISHED = {"nano-12b-v2": 12_310_001_152, "nano-9b-v2": 8_888_227_328, "qwen3-8b": 8_190_735_360}


def test_declared_shapes_are_those_of_the_parameters(config):
    declared = {name: parameter.shape for name, parameter in param_specs(config).items()}
    real = {name: tuple(parameter.shape) for name, parameter in HybridLM(config).named_parameters()}
    assert declared == real


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    config = nanohybrid.preset(preset)
    with torch.device("meta"):
        model = HybridLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[preset]
    assert Footprint.of(config).parameters == PUBLISHED[preset]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_footprint_is_what_a_state_really_takes(config, dtype):
    footprint = Footprint.of(config, dtype)
    state = HybridCache.allocate(config, slots=3, pages=5, page_size=16, dtype=dtype)
    real = sum(pool.untyped_storage().nbytes() for layer in state.layers for pool in layer.values())
    assert (
        state.bytes == real == 3 * footprint.state_bytes_per_sequence + 5 * 16 * footprint.kv_bytes_per_token
    )
    assert footprint.weight_bytes == sum(p.nbytes for p in HybridLM(config).to(dtype).parameters())
    assert sum(footprint.parameters_by_part.values()) == footprint.parameters


def test_what_fits_a_budget_is_the_most_that_fits(mixed):
    footprint = Footprint.of(mixed)
    budget = footprint.weight_bytes + 100_000
    for batch in (1, 3):
        longest = footprint.max_context(budget, batch)
        assert footprint.total(longest, batch) <= budget < footprint.total(longest + 1, batch)
    largest = footprint.max_batch(budget, 50)
    assert footprint.total(50, largest) <= budget < footprint.total(50, largest + 1)
    assert footprint.max_context(10, 1) == 0 and footprint.max_batch(10, 1) == 0
    assert Footprint.of(mixed.replace(pattern="M")).max_context(2**30) is None


def test_kept_entries_of_a_product_and_of_a_stack():
    sizes = {"heads": 3, "channels": 2, "rest": 2}
    axis = Stack(Outer("heads", "channels"), "rest")
    assert size(axis, sizes) == 8 and names(axis) == {"heads", "channels", "rest"}
    assert selected_index(axis, sizes, {"heads": [2, 0]}).tolist() == [4, 5, 0, 1, 6, 7]
    assert selected_index(axis, sizes, {"channels": [1], "rest": [0]}).tolist() == [1, 3, 5, 6]


def test_slices_by_declared_axes_are_a_model_of_the_smaller_configuration(mixed):
    """The one rule of pruning: the slices have the shapes that the smaller configuration declares."""
    kept = {
        "mamba_num_heads": [0, 2],
        "intermediate_size": list(range(7)),
        "hidden_size": list(range(0, 24, 2)),
    }
    smaller = mixed.replace(mamba_num_heads=2, intermediate_size=7, hidden_size=12)
    sizes, target = axis_sizes(mixed), param_specs(smaller)
    for name, declared in param_specs(mixed).items():
        tensor = torch.empty(declared.shape)
        for dimension, axis in enumerate(declared.axes):
            tensor = tensor.index_select(dimension, selected_index(axis, sizes, kept))
        assert tuple(tensor.shape) == target[name].shape, name
