"""The torch form of the gated norm against its equation."""

import functools

import pytest
import torch
from torch.autograd import gradcheck

from nanohybrid.ops.gated_norm import reference
from nanohybrid.ops.gated_norm import torch as torch_form


def inputs(T: int, D: int) -> dict[str, torch.Tensor]:
    return {"y_TD": torch.randn(T, D), "z_TD": torch.randn(T, D), "weight_D": torch.randn(D)}


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "fp32"]
)
@pytest.mark.parametrize("T, D, groups", [(1, 12, 1), (5, 12, 3), (17, 160, 8), (3, 60, 60)])
def test_gated_norm_equals_its_equation(T, D, groups, dtype, tolerance, agree):
    fast, expected = (
        functools.partial(op, groups=groups, eps=1e-5) for op in (torch_form.gated_norm, reference.gated_norm)
    )
    agree(fast, expected, inputs(T, D), dtype, tolerance)


def test_gated_norm_casts_once_to_the_dtype_of_the_gate():
    tensors = inputs(5, 12)
    tensors["z_TD"] = tensors["z_TD"].bfloat16()
    out = torch_form.gated_norm(**tensors, groups=3, eps=1e-5)
    expected = reference.gated_norm(**{name: t.double() for name, t in tensors.items()}, groups=3, eps=1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=2**-8)


def test_gated_norm_passes_gradcheck():
    tensors = [t.double().requires_grad_() for t in inputs(3, 6).values()]
    assert gradcheck(lambda y, z, weight: torch_form.gated_norm(y, z, weight, 2, 1e-5), tensors)
