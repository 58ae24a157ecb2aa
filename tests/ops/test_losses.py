"""Chunked losses against their equations in float64, with every gradient by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanohybrid.ops.losses import (
    chunked_cross_entropy,
    chunked_forward_kl,
    chunked_log_probs,
    reference,
    summed_cross_entropy,
    summed_forward_kl,
)
from nanohybrid.ops.losses.stream import default_chunk

SHAPES = [  # tokens, width, vocabulary, chunk
    (1, 4, 3, 1),
    (7, 5, 11, 3),
    (63, 16, 37, 64),
    (130, 8, 19, 32),
]


def head(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TE = (
        torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    )
    weight_VE = (
        torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    )
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator)
    targets_T[::3] = -100
    if tokens > 1:
        targets_T[1] = 0
    return hidden_TE, weight_VE, targets_T


def gradients(loss: Tensor, **named: Tensor) -> dict[str, Tensor]:
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].to(value.dtype),
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize(("tokens", "width", "vocabulary", "chunk"), SHAPES)
@pytest.mark.parametrize(
    ("fast", "equation"),
    [
        (chunked_cross_entropy, reference.cross_entropy),
        (chunked_log_probs, reference.log_probs),
        (summed_cross_entropy, reference.cross_entropy),
    ],
)
def test_head_losses_and_their_gradients_equal_the_equations(
    fast: Callable[..., Tensor],
    equation: Callable[..., Tensor],
    tokens: int,
    width: int,
    vocabulary: int,
    chunk: int,
) -> None:
    hidden_TE, weight_VE, targets_T = head(tokens, width, vocabulary)
    got, expected = (
        fast(hidden_TE, weight_VE, targets_T, chunk=chunk),
        equation(hidden_TE, weight_VE, targets_T),
    )
    upstream = torch.linspace(-1.0, 2.0, tokens, dtype=torch.float64)
    if got.ndim == 0:
        expected, upstream = expected.sum(), torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    names = {"hidden": hidden_TE, "weight": weight_VE}
    assert_same(
        gradients((got * upstream).sum(), **names), gradients((expected * upstream).sum(), **names), 1e-12
    )


@pytest.mark.parametrize(("tokens", "width", "vocabulary", "chunk"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fast", [chunked_forward_kl, summed_forward_kl])
def test_forward_kl_and_its_gradients_equal_the_equation(
    fast: Callable[..., Tensor],
    masked: bool,
    temperature: float,
    tokens: int,
    width: int,
    vocabulary: int,
    chunk: int,
) -> None:
    student_TE, student_VE, targets_T = head(tokens, width, vocabulary)
    teacher_TE, teacher_VE, _ = head(tokens, width + 3, vocabulary, seed=1)
    heads = student_TE, student_VE, teacher_TE, teacher_VE
    mask_T = targets_T != -100 if masked else None
    got, expected = (
        fast(*heads, temperature, mask_T, chunk=chunk),
        reference.forward_kl(*heads, temperature, mask_T),
    )
    upstream = torch.linspace(-1.0, 2.0, tokens, dtype=torch.float64)
    if got.ndim == 0:
        expected, upstream = expected.sum(), torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    names = {"student_hidden": student_TE, "student_weight": student_VE}
    assert_same(
        gradients((got * upstream).sum(), **names), gradients((expected * upstream).sum(), **names), 1e-11
    )


def test_losses_pass_gradcheck() -> None:
    hidden_TE, weight_VE, targets_T = head(5, 3, 6)
    teacher_TE, teacher_VE, _ = head(5, 4, 6, seed=1)
    for loss in (
        lambda h, w: chunked_cross_entropy(h, w, targets_T, chunk=2),
        lambda h, w: summed_cross_entropy(h, w, targets_T, chunk=2),
        lambda h, w: chunked_log_probs(h, w, targets_T, chunk=2),
        lambda h, w: chunked_forward_kl(h, w, teacher_TE, teacher_VE, 1.7, chunk=2),
        lambda h, w: summed_forward_kl(h, w, teacher_TE, teacher_VE, 1.7, chunk=2),
    ):
        assert torch.autograd.gradcheck(loss, (hidden_TE, weight_VE))


def test_forward_kl_has_no_gradient_of_the_teacher() -> None:
    student_TE, student_VE, _ = head(4, 3, 6)
    teacher_TE, teacher_VE, _ = head(4, 3, 6, seed=1)
    chunked_forward_kl(student_TE, student_VE, teacher_TE, teacher_VE).sum().backward()
    assert student_TE.grad is not None and teacher_TE.grad is None and teacher_VE.grad is None


@pytest.mark.parametrize("targets", [[], [-100, -100]])
def test_losses_without_targets_are_zero_with_zero_gradients(targets: list[int]) -> None:
    targets_T = torch.tensor(targets, dtype=torch.int64)
    for loss in (chunked_cross_entropy, summed_cross_entropy, chunked_log_probs):
        hidden_TE = torch.ones(len(targets), 3, requires_grad=True)
        weight_VE = torch.ones(5, 3, requires_grad=True)
        value = loss(hidden_TE, weight_VE, targets_T)
        value.sum().backward()
        assert value.sum() == 0 and hidden_TE.grad is not None and weight_VE.grad is not None
        assert not hidden_TE.grad.any() and not weight_VE.grad.any()


def test_chunked_cross_entropy_of_bf16_is_fp32_within_rounding() -> None:
    hidden_TE, weight_VE, targets_T = head(50, 32, 40, torch.bfloat16)
    exact = reference.cross_entropy(hidden_TE.double(), weight_VE.double(), targets_T)
    got = chunked_cross_entropy(hidden_TE, weight_VE, targets_T, chunk=16)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.1)
    names = {"hidden": hidden_TE, "weight": weight_VE}
    found, expected = gradients(got.sum(), **names), gradients(exact.sum(), **names)
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name].double() - value.double()).norm() < 0.02 * value.double().norm(), name


def test_summed_cross_entropy_under_autocast_has_bf16_products_and_fp32_gradients() -> None:
    hidden_TE, weight_VE, targets_T = head(20, 8, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = summed_cross_entropy(hidden_TE, weight_VE, targets_T)
    by_hand = summed_cross_entropy(hidden_TE.detach().bfloat16(), weight_VE.detach().bfloat16(), targets_T)
    assert under_autocast.dtype == torch.float32 and torch.equal(under_autocast, by_hand)
    assert {
        name: g.dtype for name, g in gradients(under_autocast, h=hidden_TE, w=weight_VE).items()
    } == dict.fromkeys(("h", "w"), torch.float32)


def test_losses_never_allocate_a_tensor_of_tokens_by_vocabulary() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    tokens, width, vocabulary, chunk = 96, 2, 64, 8
    hidden_TE, weight_VE, targets_T = head(tokens, width, vocabulary, torch.float32)
    with Watch():
        chunked_cross_entropy(hidden_TE, weight_VE, targets_T, chunk=chunk).sum().backward()
        summed_cross_entropy(hidden_TE, weight_VE, targets_T, chunk=chunk).backward()
        summed_forward_kl(hidden_TE, weight_VE, hidden_TE, weight_VE, chunk=chunk).backward()
    assert largest <= chunk * vocabulary


def test_default_chunk_bounds_the_logits_and_a_chunk_of_zero_is_refused() -> None:
    assert default_chunk(131072) * 131072 <= 2**25 and default_chunk(128) == 1024
    with pytest.raises(ValueError, match="at least 1"):
        chunked_cross_entropy(torch.ones(2, 2), torch.ones(3, 2), torch.tensor([0, 1]), chunk=0)
