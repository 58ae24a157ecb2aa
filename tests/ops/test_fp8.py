"""FP8 block quantization: scales, error bounds, and the three products of a linear against the recipe and
float64.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanohybrid.ops import fp8
from nanohybrid.ops.fp8 import reference

GROUPS = [(1, 128), (128, 1), (128, 128)]
SIZES = [(1, 1), (3, 127), (128, 128), (130, 257), (5, 300)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), GROUPS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fp8_fake_quantize_equals_the_recipe_group_by_group(
    height: int, width: int, rows: int, columns: int
) -> None:
    x = normal(height, width)
    assert torch.equal(fp8.fake_quantize(x, rows, columns), reference.fake_quantize(x, rows, columns))


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 140),
    width=st.integers(1, 140),
    exponent=st.integers(-60, 60),
    group=st.sampled_from(GROUPS),
)
def test_fp8_quantization_error_is_at_most_a_sixteenth_at_any_magnitude(
    height: int, width: int, exponent: int, group: tuple[int, int]
) -> None:
    x = normal(height, width, seed=height * 1000 + width) * 2.0**exponent
    q, scales = fp8.quantize(x, *group)
    assert q.shape == x.shape and q.dtype == torch.float8_e4m3fn
    assert scales.shape == (-(-height // group[0]), -(-width // group[1])) and scales.dtype == torch.float32
    assert torch.isfinite(scales).all() and (scales > 0).all() and q.float().abs().max() == fp8.LARGEST
    back = fp8.dequantize(q, scales, *group)
    step = scales.repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)[:height, :width] * 2.0**-9
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, step / 2) * (1 + 1e-5)).all()


def test_fp8_quantize_preserves_zeros() -> None:
    q, scales = fp8.quantize(torch.zeros(3, 200))
    assert not q.float().any() and (scales > 0).all()
    assert not fp8.dequantize(q, scales).any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_fp8_infinity_and_nan_make_their_own_tile_nan_and_no_other(value: float) -> None:
    x = normal(2, 256)
    x[1, 130] = value
    back = fp8.fake_quantize(x)
    assert back[1, 128:].isnan().all()
    assert torch.isfinite(back[0]).all() and torch.isfinite(back[1, :128]).all()


def test_fp8_outlier_reduces_the_precision_of_its_own_tile_only() -> None:
    x = normal(1, 256)
    x[0, 0] = 1e6
    error = (fp8.fake_quantize(x) - x).abs()
    assert (error[0, 128:] <= x[0, 128:].abs() / 16 + 1e-4).all() and error[0, 1:128].max() > 0.1


def test_fp8_blocks_are_the_same_for_a_weight_and_its_transpose() -> None:
    weight = normal(200, 150)
    assert torch.equal(fp8.fake_quantize(weight, 128, 128).T, fp8.fake_quantize(weight.T, 128, 128))


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1, 1, 1), (5, 130, 7), (129, 64, 200), (256, 128, 128)]
)
def test_fp8_linear_and_its_gradients_equal_the_recipe_and_approximate_float64(
    tokens: int, inputs: int, outputs: int
) -> None:
    x, weight, dy = (
        normal(tokens, inputs, seed=1),
        normal(outputs, inputs, seed=2),
        normal(tokens, outputs, seed=3),
    )
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8.linear(x, weight)
    y.backward(dy)
    with torch.no_grad():
        found = {"y": y.detach(), "dx": x.grad, "dweight": weight.grad}
        recipe = {
            "y": reference.forward(x, weight),
            "dx": reference.input_gradient(dy, weight),
            "dweight": reference.weight_gradient(dy, x),
        }
        exact = {
            "y": x.double() @ weight.double().T,
            "dx": dy.double() @ weight.double(),
            "dweight": dy.double().T @ x.double(),
        }
    for name, value in found.items():
        assert value is not None
        torch.testing.assert_close(
            value, recipe[name], rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        # each operand's error is at most 1/16 and in the mean square about 1/38; independent, so they add as
        # squares
        assert (value - exact[name]).norm() / exact[name].norm() < (0.13 if tokens == 1 else 0.05), name


def test_fp8_linear_preserves_dtypes_and_leading_axes() -> None:
    x = normal(2, 3, 40).bfloat16().requires_grad_()
    weight, bias = normal(6, 40).requires_grad_(), normal(6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8.linear(x, weight, bias)
    y.sum().backward()
    assert y.shape == (2, 3, 6) and y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and bias.grad is not None


def test_fp8_linear_computes_no_gradient_of_a_frozen_weight() -> None:
    x, weight = normal(4, 8).requires_grad_(), normal(3, 8)
    fp8.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
