"""Quantized weights: error bounds and bits of the formats, and the block-wise forms against the equation in
float64.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanohybrid.ops import quantized
from nanohybrid.ops.quantized import formats, reference, search
from nanohybrid.ops.quantized import torch as torch_form

SHAPES = [(1, 32), (3, 96), (17, 128), (5, 448), (130, 160), (64, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(codes: Tensor, scales: Tensor) -> Tensor:
    """Every weight by the definition of the format, one at a time, in Python floats."""
    outputs = codes.shape[0]
    inputs = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    group = inputs // scales.shape[1]
    weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    for n in range(outputs):
        for k in range(inputs):
            if codes.dtype == torch.uint8:
                value = (int(codes[n, k // 2]) >> (4 * (k % 2))) % 16 - 8
            else:
                value = float(codes[n, k])
            weight[n, k] = value * float(scales[n, k // group])
    return weight


@pytest.mark.parametrize("format", quantized.FORMATS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_dequantize_multiplies_each_code_by_the_scale_of_its_group(
    shape: tuple[int, int], format: str
) -> None:
    codes, scales = quantized.quantize(normal(*shape), format)
    assert torch.equal(reference.dequantize(codes, scales), by_hand(codes, scales))


@pytest.mark.parametrize("format", quantized.FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_block_wise_forms_equal_the_equation(
    shape: tuple[int, int], format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales = quantized.quantize(normal(*shape).to(dtype), format)
    # Several blocks, of which the last is not full.
    monkeypatch.setattr(torch_form, "BLOCK", 3 * shape[1])
    again = quantized.quantize(normal(*shape).to(dtype), format)
    assert torch.equal(codes.view(torch.uint8), again[0].view(torch.uint8)) and torch.equal(scales, again[1])
    exact = reference.dequantize(codes, scales)
    found = quantized.dequantize(codes, scales, dtype)
    wide = (
        exact if dtype == torch.float64 else exact.float()
    )  # a product of code and scale, rounded once to fp32
    assert found.dtype == dtype and torch.equal(found, wide.to(dtype))
    x = normal(2, 3, shape[1], seed=1).to(dtype)
    y, expected = quantized.linear(x, codes, scales), x.double() @ found.double().T
    assert y.dtype == dtype and y.shape == (2, 3, shape[0])
    sums = x.double().abs() @ found.double().abs().T
    assert ((y - expected).abs() <= 4 * torch.finfo(dtype).eps * sums + 1e-12).all()


def test_quantized_linear_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (codes, scales) = normal(4, 64), quantized.quantize(normal(8, 64), "int4")
    fast = quantized.linear(x, codes, scales)
    monkeypatch.setenv("NANOHYBRID_KERNELS", "reference")
    torch.testing.assert_close(quantized.linear(x, codes, scales), fast)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 20),
    groups=st.integers(1, 9),
    exponent=st.integers(-40, 40),
    format=st.sampled_from(quantized.FORMATS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_quantize_error_is_half_a_step_or_clipping_at_any_magnitude(
    outputs: int, groups: int, exponent: int, format: str, dtype: torch.dtype
) -> None:
    weight = (normal(outputs, 32 * groups, seed=outputs * 100 + groups) * 2.0**exponent).to(dtype)
    codes, scales = quantized.quantize(weight, format)
    assert (tuple(codes.shape), tuple(scales.shape)) == formats.shapes(format, *weight.shape)
    assert quantized.stored_bytes(format, *weight.shape) == codes.nbytes + scales.nbytes
    group = weight.shape[1] // scales.shape[1]
    step = scales.double().abs().repeat_interleave(group, 1)
    error = (reference.dequantize(codes, scales) - weight.double()).abs()
    if format == "fp8":
        assert (error <= torch.maximum(weight.double().abs() / 16, step * 2.0**-10) * (1 + 1e-6)).all()
    elif format == "int8":
        assert (
            error <= step * 0.76
        ).all()  # half, and a quarter where bf16 rounded the scale below largest / 127
    else:
        inside = weight.double().abs() <= 7.5 * step
        assert (error[inside] <= 0.5001 * step[inside]).all()
        assert (error <= 2.4 * step).all()  # the last divisor clips 9.8 to 7.5 + what bf16 adds


def test_int4_uses_minus_eight_for_either_sign() -> None:
    for sign in (1, -1):
        weight = torch.zeros(1, 32)
        weight[0, :2] = torch.tensor([8.0, -7.0]) * sign
        codes, scales = quantized.quantize(weight, "int4")
        assert torch.equal(reference.dequantize(codes, scales).float(), weight)


def test_int4_search_has_less_error_than_absmax_scales_and_little_more_than_a_fine_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = normal(64, 1024)

    def error() -> float:
        return (
            (quantized.dequantize(*quantized.quantize(weight, "int4"), torch.float32) - weight)
            .square()
            .sum()
            .item()
        )

    found = error()
    groups = weight.unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum().item()
    monkeypatch.setattr(search, "DIVISORS", tuple(6.5 + 0.05 * step for step in range(100)))
    assert error() <= found <= 1.01 * error() and found < 0.76 * plain


def test_int4_importance_reduces_the_error_of_important_columns() -> None:
    weight, importance = normal(64, 256), torch.ones(256)
    importance[::4] = 100.0
    plain = quantized.dequantize(*quantized.quantize(weight, "int4"), torch.float32) - weight
    weighted = quantized.dequantize(*quantized.quantize(weight, "int4", importance), torch.float32) - weight
    assert (weighted.square() * importance).sum() < 0.9 * (plain.square() * importance).sum()
    assert plain.square().sum() < weighted.square().sum()


@pytest.mark.parametrize("format", quantized.FORMATS)
def test_quantize_preserves_zeros_and_keeps_tiny_weights_finite(format: str) -> None:
    weight = torch.zeros(3, 128)
    weight[2] = 1e-40
    codes, scales = quantized.quantize(weight, format)
    back = quantized.dequantize(codes, scales, torch.float32)
    assert not back[:2].any() and back.isfinite().all() and (scales != 0).all()


@pytest.mark.parametrize("format", quantized.FORMATS)
def test_quantize_refuses_a_weight_that_is_not_finite(format: str) -> None:
    weight = normal(3, 128)
    weight[1, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantized.quantize(weight, format)


def test_quantized_groups_follow_the_format() -> None:
    assert [quantized.group_of("int8", k) for k in (128, 4480, 448, 96, 160, 100, 112)] == [
        128,
        128,
        64,
        32,
        32,
        100,
        112,
    ]
    assert (
        quantized.holds("int4", 96)
        and not quantized.holds("int4", 112)
        and quantized.holds("int8", 7)
        and quantized.holds("fp8", 7)
    )
    with pytest.raises(ValueError, match="rows of 112 have no int4 form"):
        quantized.quantize(normal(2, 112), "int4")
    with pytest.raises(ValueError, match="known are int8, int4, fp8"):
        quantized.quantize(normal(2, 32), "int3")


@pytest.mark.parametrize("format", quantized.FORMATS)
def test_quantized_linear_has_the_gradient_of_its_input(format: str) -> None:
    codes, scales = quantized.quantize(normal(6, 64), format)
    x = normal(5, 64, seed=3).requires_grad_()
    quantized.linear(x, codes, scales).sum().backward()
    torch.testing.assert_close(
        x.grad, quantized.dequantize(codes, scales, torch.float32).sum(0).expand(5, 64)
    )
