"""Which form of an op runs: the fastest that the tensors' device has, or the one that NANOHYBRID_KERNELS forces for all of them.

    reference   the equation                       any device
    torch       plain torch, the form every op has  any device
    numba       compiled loops                      CPU tensors; there the default of an op that has it
    triton      kernels                             CUDA tensors; there the default of an op that has it

An op without the form that is asked for, or whose form does not take these tensors, runs its torch form.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line asks for FORMS before it knows whether it needs torch
    from torch import Tensor

FORMS = ("reference", "torch", "numba", "triton")
Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """A form that is compiled, named as "module:function" and imported when it first runs.

    gradients: whether autograd goes through it. A kernel that it does not go through is passed over where a gradient is
    wanted. float64 is left to torch.
    """

    path: str
    gradients: bool = False

    @cached_property
    def function(self) -> Function:
        module, _, name = self.path.partition(":")
        found: Function = getattr(importlib.import_module(module), name)
        return found

    @cached_property
    def opaque(self) -> Function:
        """The same for torch.compile, which calls it as it is and compiles what lies between kernels."""
        import torch

        found: Function = torch.compiler.disable(self.function)
        return found

    def takes(self, tensors: tuple[Tensor | None, ...]) -> bool:
        import torch

        given = [tensor for tensor in tensors if tensor is not None]
        return (self.gradients or not wants_gradient(*given)) and all(
            tensor.dtype != torch.float64 for tensor in given
        )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to go through an op on these tensors."""
    import torch

    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def choose(
    *tensors: Tensor | None,
    reference: Function,
    torch: Function,
    numba: Kernel | None = None,
    triton: Kernel | None = None,
) -> Function:
    """The form to run on `tensors`, the op's floating-point inputs; the first one's device counts.

    Raises ValueError where the environment names a form that does not exist, or Triton for CPU tensors without its interpreter.
    """
    forced = os.environ.get("NANOHYBRID_KERNELS", "")
    if forced and forced not in FORMS:
        raise ValueError(f"NANOHYBRID_KERNELS is {forced!r}: known are {', '.join(FORMS)}")
    if forced in ("reference", "torch"):
        return reference if forced == "reference" else torch
    on_cuda = bool(tensors) and tensors[0] is not None and tensors[0].is_cuda
    if forced == "triton" and not on_cuda and not interpreted():
        raise ValueError(
            "NANOHYBRID_KERNELS is 'triton' and the tensors are on a CPU; set TRITON_INTERPRET=1 too, or use a GPU"
        )
    kernel = triton if forced == "triton" or (on_cuda and not forced and _has_triton()) else None
    on_cpu = not on_cuda and not (
        tensors and tensors[0] is not None and tensors[0].device.type != "cpu"
    )  # meta tensors have no memory
    if on_cpu and forced in ("", "numba"):
        kernel = numba
    if kernel is None or not kernel.takes(tensors):
        return torch
    return kernel.opaque if "torch._dynamo" in sys.modules else kernel.function


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on a CPU. Triton reads this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")


def runs_triton() -> bool:
    """Whether ops on CUDA tensors run their Triton forms, where they have one."""
    return os.environ.get("NANOHYBRID_KERNELS", "") in ("", "triton") and _has_triton()


_found: list[bool] = []


def _has_triton() -> bool:
    """Torch for CUDA brings Triton on Linux, not everywhere."""
    if not _found:
        _found.append(find_spec("triton") is not None)
    return _found[0]
