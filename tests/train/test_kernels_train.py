"""A model trained on kernels and on plain torch: the same loss and the same gradients, by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.model import HybridLM
from nanohybrid.train import next_token_loss
from nanohybrid.train.precision import fp8_linears

SMALL = HybridConfig(
    pattern="M-*", vocab_size=40, hidden_size=24, intermediate_size=40, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, mamba_num_heads=2, mamba_head_dim=12, n_groups=1, ssm_state_size=8,
)  # fmt: skip


@pytest.fixture
def trained(monkeypatch) -> Callable[..., dict[str, Tensor]]:
    """trained(form, fp8): the loss and all gradients of one small batch of documents, by the ops of this
    form."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(form: str, fp8: bool = False) -> dict[str, Tensor]:
        monkeypatch.setenv("NANOHYBRID_KERNELS", form)
        with torch.device(device):
            model = HybridLM(SMALL, seed=0)
        batch = Batch.of(
            [([i * k % 40 for i in range(length)], [1] * length) for length, k in ((9, 3), (30, 7))]
        ).to(device)
        if fp8:
            with fp8_linears(model.backbone.layers, 0):
                loss, _ = next_token_loss(model, batch)
                loss.backward()
        else:
            loss, _ = next_token_loss(model, batch)
            loss.backward()
        found = {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        return {"loss": loss.detach(), **found}

    return run


def test_training_on_triton_gives_the_loss_and_gradients_of_torch(trained):
    truth, found = trained("torch"), trained("triton")
    assert truth.keys() == found.keys() and len(truth) > 15
    for name, value in truth.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def test_training_in_fp8_on_triton_matches_the_torch_emulation(trained):
    """Sums differ in their last bit, so a few numbers round differently; hence the tolerance."""
    truth, found = trained("torch", fp8=True), trained("triton", fp8=True)
    for name, value in truth.items():
        assert (found[name] - value).norm() <= 0.03 * value.norm(), name
    assert (trained("torch")["loss"] - truth["loss"]).abs() > 1e-4 * truth["loss"]  # and FP8 is not fp32
