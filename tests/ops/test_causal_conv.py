"""The torch form of the causal convolution against its equation."""

import functools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from nanohybrid.ops.causal_conv import reference
from nanohybrid.ops.causal_conv import torch as torch_form
from nanohybrid.ops.layout import Layout


def inputs(layout: Layout, C: int = 6, W: int = 4, state: bool = True) -> dict[str, Tensor]:
    tensors = {
        "x_TC": torch.randn(layout.tokens, C),
        "weight_CW": torch.randn(C, W),
        "bias_C": torch.randn(C),
    }
    return tensors | ({"initial_SWC": torch.randn(layout.sequences, W - 1, C)} if state else {})


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_causal_conv_equals_its_equation_in_float64(layout, W, state, agree):
    fast, expected = (
        functools.partial(op, layout=layout) for op in (torch_form.causal_conv, reference.causal_conv)
    )
    agree(fast, expected, inputs(layout, W=W, state=state), torch.float64, 1e-12)


def test_causal_conv_equals_its_equation_in_fp32(layout, agree):
    fast, expected = (
        functools.partial(op, layout=layout) for op in (torch_form.causal_conv, reference.causal_conv)
    )
    agree(fast, expected, inputs(layout), torch.float32, 1e-5)


def test_causal_conv_takes_bf16_sums_in_fp32_and_returns_its_state_in_bf16(layout):
    tensors = inputs(layout)
    tensors["x_TC"], tensors["initial_SWC"] = tensors["x_TC"].bfloat16(), tensors["initial_SWC"].bfloat16()
    y, state = torch_form.causal_conv(**tensors, layout=layout)
    expected, exact_state = reference.causal_conv(**tensors, layout=layout)
    assert y.dtype == torch.float32 and state.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    assert torch.equal(state, exact_state)


def test_causal_conv_passes_gradcheck():
    layout = Layout.contiguous([3, 1, 5], [2, 0, 0], [0, 1, 2], 128)
    tensors = [t.double().requires_grad_() for t in inputs(layout, C=2).values()]
    assert gradcheck(
        lambda x, weight, bias, initial: torch_form.causal_conv(x, weight, bias, layout, initial), tensors
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_causal_conv_resets_state_at_document_boundaries(poison):
    layout = Layout.packed([7, 2, 5])
    tensors = inputs(layout, state=False)

    def run(x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x_TC.clone().requires_grad_()
        y, state = torch_form.causal_conv(**(tensors | {"x_TC": x}), layout=layout)
        y[9:].sum().backward()
        return y[9:], state[2], x.grad[9:]

    dirty = tensors["x_TC"].clone()
    dirty[:9] = poison
    for clean, after in zip(run(tensors["x_TC"]), run(dirty), strict=True):
        assert torch.equal(clean, after)


def test_causal_conv_gradients_do_not_cross_document_boundaries():
    layout = Layout.packed([4, 6])
    tensors = inputs(layout, state=False)
    tensors["x_TC"].requires_grad_()
    y, _ = torch_form.causal_conv(**tensors, layout=layout)
    y[4:].sum().backward()
    assert (tensors["x_TC"].grad[:4] == 0).all()
