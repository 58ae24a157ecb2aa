"""Triton losses against their equations in float64, through the chunked losses: on a GPU, or in Triton's
interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanohybrid.ops.losses import (
    chunked_cross_entropy,
    chunked_forward_kl,
    kernels,
    reference,
    summed_cross_entropy,
    summed_forward_kl,
)

SHAPES = [(1, 4, 3), (7, 5, 100), (30, 16, 37)]  # tokens, width, vocabulary


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    """Forces the Triton kernels, with 16 logits per iteration, so every row has several."""
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")
    monkeypatch.setattr(kernels, "BLOCK", 16)


def head(tokens: int, width: int, vocabulary: int, chip: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    targets_T = torch.randint(vocabulary, (tokens,))
    targets_T[2::3] = -100
    return (
        torch.randn(tokens, width, device=chip),
        torch.randn(vocabulary, width, device=chip) * 3,
        targets_T.to(chip),
    )


def check(
    fast: Callable[..., Tensor], equation: Callable[..., Tensor], hidden: Tensor, weight: Tensor
) -> None:
    leaves, wide = [
        [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        for dtype in (torch.float32, torch.float64)
    ]
    found, expected = fast(*leaves), equation(*wide)
    if found.ndim == 0:
        expected = expected.sum()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    upstream = torch.linspace(-1.0, 2.0, found.numel(), dtype=torch.float64, device=found.device).view(
        found.shape
    )
    got, exact_gradients = (
        torch.autograd.grad((found * upstream).sum(), leaves),
        torch.autograd.grad((expected * upstream).sum(), wide),
    )
    for name, gradient, exact in zip(("hidden", "weight"), got, exact_gradients, strict=True):
        torch.testing.assert_close(
            gradient.double(), exact, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("fast", [chunked_cross_entropy, summed_cross_entropy])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_cross_entropy_and_its_gradients_equal_the_equation(shape, fast, chip):
    hidden, weight, targets = head(*shape, chip)
    check(
        lambda h, w: fast(h, w, targets, chunk=8),
        lambda h, w: reference.cross_entropy(h, w, targets),
        hidden,
        weight,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("fast", [chunked_forward_kl, summed_forward_kl])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_forward_kl_and_its_gradients_equal_the_equation(shape, fast, temperature, chip):
    hidden, weight, targets = head(*shape, chip)
    teacher = (
        torch.randn(shape[0], shape[1] + 3, device=chip),
        torch.randn(shape[2], shape[1] + 3, device=chip),
    )
    check(
        lambda h, w: fast(h, w, *teacher, temperature, targets != -100, chunk=8),
        lambda h, w: reference.forward_kl(h, w, *(t.double() for t in teacher), temperature, targets != -100),
        hidden,
        weight,
    )


def test_triton_cross_entropy_overwrites_the_logits_with_the_gradient(chip):
    logits, targets = torch.randn(3, 40, device=chip).bfloat16(), torch.tensor([0, 39, 17], device=chip)
    exact = torch.softmax(logits.double(), -1) - torch.nn.functional.one_hot(targets, 40)
    loss, gradient = kernels.cross_entropy(logits, targets, True)
    assert (
        gradient.data_ptr() == logits.data_ptr()
        and gradient.dtype == torch.bfloat16
        and loss.dtype == torch.float32
    )
    torch.testing.assert_close(gradient.double(), exact, atol=1e-6, rtol=2**-7)


def test_triton_cross_entropy_is_accurate_for_large_logits(chip):
    logits = torch.tensor([[1e4, -1e4, 0.0] + [9999.0] * 30], device=chip)
    loss, _ = kernels.cross_entropy(logits.clone(), torch.tensor([2], device=chip), False)
    exact = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([2], device=chip))
    torch.testing.assert_close(loss[0].double(), exact, atol=1e-2, rtol=1e-6)
