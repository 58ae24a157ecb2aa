"""torch.compile sees through the model and the gradients written by hand."""

import shutil

import pytest
import torch
from torch import Tensor

from nanohybrid.model import HybridLM, Layout


def loss(model: HybridLM, tokens: Tensor, layout: Layout) -> Tensor:
    return model(tokens, layout).log_softmax(-1)[:, 3].sum()


def gradients(model: HybridLM) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_is_the_eager_step_in_one_graph(mixed, tokens, monkeypatch):
    """In one graph where the layout has been used before: its index tensors are then there to be read, not to
    be traced.
    """
    monkeypatch.undo()  # the compiler asks for uninitialized memory by its own means
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")  # compiled loops are called as they are, between graphs
    model, layout = HybridLM(mixed, seed=0), Layout.packed([17, 130, 53, 100])
    expected = loss(model, tokens, layout)
    expected.backward()
    wanted = gradients(model)
    compiled = torch.compile(loss, fullgraph=True)(model, tokens, layout)
    compiled.backward()
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


@pytest.mark.slow
def test_a_compiled_step_calls_kernels_as_they_are(mixed, tokens, monkeypatch):
    """Compiled by a backend that compiles nothing; the kernels run on a GPU or in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.undo()
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = HybridLM(mixed, seed=0)
    few, layout = tokens[:40].to(device), Layout.packed([17, 23])
    expected = loss(model, few, layout)
    expected.backward()
    wanted = gradients(model)
    torch.compile(loss, backend="aot_eager")(model, few, layout).backward()
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
