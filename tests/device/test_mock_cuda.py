"""The mock CUDA device raises where a real one raises, and finds a planted error."""

from pathlib import Path

import pytest
import torch
from mock_cuda import mock_cuda_device
from torch import Tensor, nn

from nanohybrid.checkpoint import load
from nanohybrid.data import Batch
from nanohybrid.train import mean_loss


class Doubled(torch.autograd.Function):
    """Its gradient is on the device of the incoming gradient, or on the CPU if `wrong` is set."""

    wrong = False

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy * torch.full(dy.shape, 2.0, device="cpu" if Doubled.wrong else dy.device)


def test_mock_cuda_device_raises_for_operations_on_both_devices() -> None:
    with mock_cuda_device():
        here, there = torch.ones(3), torch.ones(3).to("cuda")
        assert there.device == torch.device("cuda:0") and there.is_cuda and not here.is_cuda
        assert (
            (there * 2 + torch.tensor(1.0)).is_cuda and there[1:].is_cuda and torch.zeros_like(there).is_cuda
        )
        assert (
            torch.arange(3, device=there.device).is_cuda
            and not there.cpu().is_cuda
            and not there.to("cpu", torch.int64).is_cuda
        )
        assert there[torch.tensor([0, 2])].is_cuda and here.copy_(there) is here and not here.is_cuda
        for meet in (
            lambda: here + there,
            lambda: here * there.sum(),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: nn.functional.embedding(torch.tensor([1]), torch.ones(2, 2, device="cuda")),
            lambda: torch.cat([here, there]),
            lambda: there.index_put_((torch.tensor([0, 1]),), here[:2]),
        ):
            with pytest.raises(RuntimeError, match="meet tensors of the CPU"):
                meet()
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()


@pytest.mark.parametrize("wrong", [False, True])
def test_mock_cuda_device_checks_backward_passes(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubled, "wrong", wrong)
    with mock_cuda_device():
        weight = nn.Parameter(torch.ones(3, device="cuda"))
        loss = Doubled.apply(weight * 3).square().sum()  # type: ignore[no-untyped-call]
        if wrong:
            with pytest.raises(RuntimeError, match="meet tensors of the CPU"):
                loss.backward()
            return
        loss.backward()
        assert weight.grad is not None and weight.grad.is_cuda and weight.grad.tolist() == [72.0] * 3


def test_mock_cuda_device_finds_targets_left_on_the_cpu(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    batch = Batch.of([([20, 21, 22, 23], [1, 1, 1, 1])])
    with mock_cuda_device():
        model = load(parent, torch.float32, "cuda")
        assert model.device.type == "cuda" and mean_loss(model, [batch]) > 0
        monkeypatch.setattr(
            Batch, "to", lambda self, device: Batch(self.tokens_T.to(device), self.targets_T, self.layout)
        )
        with pytest.raises(RuntimeError, match="meet tensors of the CPU"):  # targets that stayed behind
            mean_loss(model, [batch])
