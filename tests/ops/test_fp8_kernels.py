"""FP8 Triton kernels against the recipe, bits and products: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from nanohybrid.ops import fp8
from nanohybrid.ops.fp8 import kernels, products, reference
from nanohybrid.ops.fp8 import torch as torch_form
from nanohybrid.ops.fp8.quantize_kernels import Operand, quantize_blocks, quantize_tiles

SIZES = [(1, 1), (3, 127), (130, 257), (5, 300)]


def assert_is(operand: Operand, q: Tensor, scales: Tensor) -> None:
    """Assert the same values and scales, and zeros where the sum is padded."""
    values = operand.q.float().cpu()
    assert torch.equal(values[:, : q.shape[1]], q.float()) and torch.equal(operand.scales.cpu(), scales)
    assert operand.q.shape[1] % 128 == 0 and not values[:, q.shape[1] :].any()


@pytest.mark.parametrize("exponent", [0, -40, 60])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_quantize_kernels_have_the_bits_of_the_recipe(size, exponent, chip):
    x = torch.randn(size) * 2.0**exponent
    x.view(-1)[::3] *= 2.0**-14  # some in the subnormal numbers
    rows, columns = quantize_tiles(x.to(chip))
    assert_is(rows, *torch_form.quantize(x))
    assert_is(columns, *torch_form.quantize(x.T.contiguous()))
    weight, transposed = quantize_blocks(x.to(chip))
    q, scales = torch_form.quantize(x, 128, 128)
    assert_is(weight, q, scales)
    assert_is(transposed, q.T, scales.T)


def test_quantize_tiles_takes_slices_and_bf16(chip):
    x = torch.randn(6, 400).bfloat16()[:, 100:350]
    rows, none = quantize_tiles(x.to(chip), columns=False)
    assert none is None
    assert_is(rows, *torch_form.quantize(x))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_quantize_tiles_infinity_and_nan_make_their_own_tile_nan_and_no_other(value, chip):
    x = torch.randn(2, 256)
    x[1, 130] = value
    rows, _ = quantize_tiles(x.to(chip), columns=False)
    back = torch_form.dequantize(rows.q, rows.scales).cpu()
    assert not back[1, 128:].isfinite().any()
    assert back[0].isfinite().all() and back[1, :128].isfinite().all()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 1, 1), (5, 130, 7), (129, 64, 200)])
def test_triton_fp8_linear_and_its_gradients_equal_the_recipe(tokens, inputs, outputs, chip):
    x, weight, dy = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    given = [t.to(chip).clone().requires_grad_() for t in (x, weight)]
    y = kernels.linear(*given)
    y.backward(dy.to(chip))
    recipe = {
        "y": (y.detach(), reference.forward(x, weight)),
        "dx": (given[0].grad, reference.input_gradient(dy, weight)),
        "dweight": (given[1].grad, reference.weight_gradient(dy, x)),
    }
    for name, (found, expected) in recipe.items():
        torch.testing.assert_close(
            found.cpu(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_triton_fp8_linear_preserves_dtypes_and_leading_axes_and_frozen_weights(chip):
    x = torch.randn(2, 3, 40, device=chip).bfloat16().requires_grad_()
    weight, bias = torch.randn(6, 40, device=chip), torch.randn(6, device=chip, requires_grad=True)
    y = kernels.linear(x, weight, bias)
    y.sum().backward()
    assert y.shape == (2, 3, 6) and y.dtype == x.grad.dtype == torch.bfloat16 and x.grad.shape == x.shape
    assert weight.grad is None and bias.grad is not None
    torch.testing.assert_close(
        y, fp8.torch.linear(x.cpu(), weight.cpu(), bias.cpu()).to(chip), rtol=2**-7, atol=1e-2
    )


def test_fp8_linear_runs_triton_where_the_environment_names_it(chip, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")
    monkeypatch.setattr(kernels, "quantize_tiles", lambda *_, **__: pytest.fail("chosen"))
    with pytest.raises(pytest.fail.Exception, match="chosen"):
        fp8.linear(torch.randn(2, 4, device=chip), torch.randn(3, 4, device=chip))


def race(monkeypatch, other, time_of_other: float) -> bool:
    """Whether `fastest` chooses another product over ours, which takes 1 ms."""
    a, b = quantize_tiles(torch.randn(4, 130))[0], quantize_blocks(torch.randn(5, 130))[0]
    monkeypatch.setattr(products, "torch_product", other)
    monkeypatch.setattr(products, "milliseconds", lambda run, *_: time_of_other if run is other else 1.0)
    return products.fastest(a, b, torch.float32) is other


def test_fastest_chooses_torchs_product_only_if_it_runs_agrees_and_is_faster(monkeypatch):
    def same(a, b, dtype):
        return products.our_product(a, b, dtype)

    def wrong(a, b, dtype):
        return 2 * products.our_product(a, b, dtype)

    def refuses(a, b, dtype):
        raise RuntimeError("not for this GPU")

    assert race(monkeypatch, same, 0.5) and not race(monkeypatch, same, 2.0)
    with pytest.warns(UserWarning, match="so our own is used: not for this GPU"):
        assert not race(monkeypatch, wrong, 0.5) and not race(monkeypatch, refuses, 0.5)
