"""Triton gradients against their equations in float64, every gradient by name: on a GPU, or in Triton's
interpreter.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.causal_conv import reference as conv_reference
from nanohybrid.ops.causal_conv import triton_autograd as conv_triton
from nanohybrid.ops.gated_norm import reference as gated_reference
from nanohybrid.ops.gated_norm import triton_autograd as gated_triton
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.residual_norm import reference as residual_reference
from nanohybrid.ops.residual_norm import triton_autograd as residual_triton
from nanohybrid.ops.rms_norm import reference as rms_reference
from nanohybrid.ops.rms_norm import torch as rms_torch
from nanohybrid.ops.rms_norm import triton as rms_triton
from nanohybrid.ops.squared_relu import reference as relu_reference
from nanohybrid.ops.squared_relu import torch as relu_torch
from nanohybrid.ops.squared_relu import triton as relu_triton


def conv_inputs(layout: Layout, C: int, W: int) -> dict[str, Tensor]:
    return {"x_TC": torch.randn(layout.tokens, C), "weight_CW": torch.randn(C, W), "bias_C": torch.randn(C)}


def conv_silu_equation(**arguments):
    y_TC, last_SWC = conv_reference.causal_conv(**arguments)
    return F.silu(y_TC), last_SWC


CONVS = [(conv_triton.causal_conv, conv_reference.causal_conv), (conv_triton.conv_silu, conv_silu_equation)]
RAGGED = [([1], 6, 4), ([5, 40, 2, 1, 33], 130, 4), ([3, 2], 5, 2)]


@pytest.mark.parametrize("fast, equation", CONVS, ids=["plain", "with silu"])
@pytest.mark.parametrize("lengths, C, W", RAGGED, ids=str)
def test_triton_conv_has_the_gradients_of_its_equation(lengths, C, W, fast, equation, agree, chip):
    layout = Layout.packed(lengths)
    over = [functools.partial(op, layout=layout) for op in (fast, equation)]
    agree(*over, conv_inputs(layout, C, W), torch.float32, 1e-5, chip)


@pytest.mark.parametrize("fast, equation", CONVS, ids=["plain", "with silu"])
def test_triton_conv_has_the_gradients_of_its_equation_when_it_continues_a_state(fast, equation, agree, chip):
    layout = Layout.contiguous([3, 1, 5], [2, 0, 0], [0, 1, 2], 128)
    tensors = conv_inputs(layout, 5, 4) | {"initial_SWC": torch.randn(3, 3, 5)}
    agree(
        *(functools.partial(op, layout=layout) for op in (fast, equation)), tensors, torch.float32, 1e-5, chip
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_triton_conv_gradients_do_not_cross_document_boundaries(poison, chip):
    layout = Layout.packed([7, 2, 5])
    clean = {name: t.to(chip) for name, t in conv_inputs(layout, 6, 4).items()}

    def gradient(x_TC: Tensor) -> Tensor:
        x = x_TC.clone().requires_grad_()
        conv_triton.conv_silu(**(clean | {"x_TC": x}), layout=layout, output_final_state=False)[0][
            9:
        ].sum().backward()
        return x.grad

    dirty = clean["x_TC"].index_fill(0, torch.arange(9, device=chip), poison)
    assert torch.equal(gradient(dirty)[9:], gradient(clean["x_TC"])[9:])
    assert not gradient(clean["x_TC"])[:9].any()


@pytest.mark.parametrize("T, D, groups", [(1, 12, 1), (5, 12, 3), (17, 160, 8), (9, 2560, 2)])
def test_triton_gated_norm_has_the_gradients_of_its_equation(T, D, groups, agree, chip):
    tensors = {"y_TD": torch.randn(T, D), "z_TD": torch.randn(T, D), "weight_D": torch.randn(D)}
    over = [
        functools.partial(op, groups=groups, eps=1e-5)
        for op in (gated_triton.gated_norm, gated_reference.gated_norm)
    ]
    agree(*over, tensors, torch.float32, 1e-5, chip)


@pytest.mark.parametrize("shape", [(1, 12), (3, 2, 30), (9, 1300)], ids=str)
def test_rms_norm_has_the_gradients_of_its_equation(shape, agree, chip):
    tensors = {"x": torch.randn(shape), "weight": torch.randn(shape[-1])}
    for form, device in ((rms_triton, chip), (rms_torch, "cpu")):
        agree(
            *(functools.partial(module.rms_norm, eps=1e-5) for module in (form, rms_reference)),
            tensors,
            torch.float32,
            1e-5,
            device,
        )


@pytest.mark.parametrize("T, E", [(1, 8), (9, 300)])
def test_triton_residual_norm_adds_the_gradients_of_stream_and_norm(T, E, agree, chip):
    tensors = {"h_TE": torch.randn(T, E), "update_TE": torch.randn(T, E), "weight_E": torch.randn(E)}
    over = [
        functools.partial(op, eps=1e-5)
        for op in (residual_triton.residual_norm, residual_reference.residual_norm)
    ]
    agree(*over, tensors, torch.float32, 1e-5, chip)


def test_triton_residual_norm_has_the_gradient_of_the_norm_alone_when_the_stream_is_unused(chip):
    h, update, weight = (
        torch.randn(*shape, device=chip, requires_grad=True) for shape in ((4, 10), (4, 10), (10,))
    )
    residual_triton.residual_norm(h, update, weight, 1e-5)[1].square().sum().backward()
    exact = h.detach().double().requires_grad_()
    rms_reference.rms_norm(
        exact + update.detach().double(), weight.detach().double(), 1e-5
    ).square().sum().backward()
    torch.testing.assert_close(h.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 3, 401)], ids=str)
def test_squared_relu_has_the_gradient_of_its_equation(shape, agree, chip):
    for form, device in ((relu_triton, chip), (relu_torch, "cpu")):
        agree(
            form.squared_relu,
            relu_reference.squared_relu,
            {"x": torch.randn(shape)},
            torch.float32,
            1e-6,
            device,
        )


def test_triton_squared_relu_propagates_nan(chip):
    x = torch.tensor([float("nan"), -1.0, 2.0, float("-inf")], device=chip)
    assert relu_triton.squared_relu(x).isnan().tolist() == [True, False, False, False]


def test_triton_conv_takes_bf16_and_sums_in_fp32(chip, close):
    layout = Layout.packed([5, 12])
    x, dy = torch.randn(17, 24).bfloat16(), torch.randn(17, 24).bfloat16()
    weight, bias = torch.randn(24, 4), torch.randn(24)
    given = [t.to(chip).clone().requires_grad_() for t in (x, weight, bias)]
    conv_triton.conv_silu(*given, layout=layout, output_final_state=False)[0].backward(dy.to(chip))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    conv_silu_equation(**dict(zip(("x_TC", "weight_CW", "bias_C"), exact, strict=True)), layout=layout)[
        0
    ].backward(dy.double())
    for name, found, expected, tolerance in zip(
        ("x", "weight", "bias"), given, exact, (2e-2, 1e-5, 1e-5), strict=True
    ):
        assert found.grad.dtype == found.dtype, name
        close(found.grad, expected.grad, tolerance)
