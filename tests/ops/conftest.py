"""Awkward ragged layouts on which every op is tested, and the comparison of a fast form with its
reference.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout

sys.path.insert(0, str(Path(__file__).parent))  # where scan_inputs.py is

LAYOUTS = {
    "one token": Layout.packed([1]),
    "short documents": Layout.packed([1, 2, 3, 5, 17]),
    "a chunk and its neighbors": Layout.packed([127, 128, 129]),
    "longer than two chunks": Layout.packed([63, 300]),
    "equal lengths": Layout.equal(3, 20),
    "prefill": Layout.contiguous([3, 130], [0, 0], [1, 0], 256, 32),
    "continuation across a border": Layout.with_cache(
        [5, 130, 3], [125, 200, 2], [3, 0, 2], [range(5), [30, 12, *range(14, 23)], [9]], 32
    ),
    "decode": Layout.with_cache(
        [1, 1, 1], [5, 127, 128], [0, 1, 2], [range(10), range(10, 20), range(20, 30)], 16
    ),
    "decode, scattered": Layout.with_cache(
        [1, 1, 1, 1], [6, 0, 31, 40], [2, 0, 3, 1], [[7], [1], [4, 2], [9, 3, 8]], 16
    ),
    "mixed": Layout.with_cache(
        [17, 1, 40, 1, 2], [0, 77, 100, 0, 31], [4, 0, 2, 6, 1],
        [[0, 5], range(10, 15), range(20, 30), [1], [3, 2, 9]], 16,
    ),
}  # fmt: skip


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


Op = Callable[..., "Tensor | tuple[Tensor, ...]"]


def results(
    op: Op, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Outputs of `op`, and the gradient of every input by name, under fixed random weights on the outputs."""
    inputs = {name: tensor.to(device, dtype).detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = op(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(output.shape, dtype=torch.float64, generator=generator) for output in outputs]
    sum(
        (output * weight.to(output.device, output.dtype)).sum()
        for output, weight in zip(outputs, weights, strict=True)
    ).backward()
    found = {f"output {i}": output.detach().cpu() for i, output in enumerate(outputs)}
    for name, tensor in inputs.items():
        found[f"gradient of {name}"] = (
            torch.zeros_like(tensor).cpu() if tensor.grad is None else tensor.grad.cpu()
        )
    return found


@pytest.fixture
def agree() -> Callable[..., None]:
    """agree(fast, reference, tensors, dtype, tolerance): outputs and gradients are equal, relative to the
    largest entry of each.
    """

    def check(
        fast: Op,
        reference: Op,
        tensors: dict[str, Tensor],
        dtype: torch.dtype,
        tolerance: float,
        device: torch.device | str = "cpu",
    ) -> None:
        expected = results(reference, tensors, torch.float64)
        for name, value in results(fast, tensors, dtype, device).items():
            assert value.isfinite().all(), name
            difference = (value.double() - expected[name]).abs().max()
            assert difference <= tolerance * expected[name].abs().max().clamp(min=0.1), (
                f"{name}: {difference:.3g}"
            )

    return check


@pytest.fixture(scope="session")
def chip() -> torch.device:
    """Where Triton kernels run: a CUDA device, or without one the CPU, in Triton's interpreter
    (tests/conftest.py).
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def close() -> Callable[..., None]:
    """close(found, expected, tolerance): the norm of the difference relative to that of `expected`. NaN
    fails.
    """

    def check(found: Tensor, expected: Tensor, tolerance: float) -> None:
        expected = expected.double().cpu()
        assert found.shape == expected.shape
        error = float((found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))
        assert error <= tolerance, f"relative error {error:.3g}"

    return check
