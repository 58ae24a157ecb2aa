"""Which form of an op runs: the fastest for the tensors' device, or the one of NANOHYBRID_KERNELS.

    reference   the equation                        any device
    torch       plain torch; every op has it        any device
    numba       compiled loops                      CPU tensors, where it is the default of an op that has it
    triton      kernels                             CUDA tensors, where it is the default of an op that has it

An op runs its torch form where it lacks the wanted form, or where that form does not support the tensors.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line needs FORMS, but not torch
    from torch import Tensor

FORMS = ("reference", "torch", "numba", "triton")
Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """A compiled form, named as "module:function" and imported when it first runs.

    gradients: whether it has a gradient. Without one it is not used where autograd needs a gradient. float64
    is computed by torch.
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
        """The function for torch.compile, which calls it without tracing and compiles the code around it."""
        import torch

        found: Function = torch.compiler.disable(self.function)
        return found

    def supports(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether the kernel can run on these tensors: not float64, and no gradient that it lacks."""
        import torch

        given = [tensor for tensor in tensors if tensor is not None]
        return (self.gradients or not wants_gradient(*given)) and all(
            tensor.dtype != torch.float64 for tensor in given
        )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd needs a gradient of an op on these tensors."""
    import torch

    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def choose(
    *tensors: Tensor | None,
    reference: Function,
    torch: Function,
    numba: Kernel | None = None,
    triton: Kernel | None = None,
) -> Function:
    """The form to run on `tensors`, the op's floating-point inputs. The device of the first one decides.

    Raises ValueError where the environment names an unknown form, or Triton for CPU tensors without its
    interpreter.
    """
    forced = os.environ.get("NANOHYBRID_KERNELS", "")
    if forced and forced not in FORMS:
        raise ValueError(f"NANOHYBRID_KERNELS is {forced!r}: known are {', '.join(FORMS)}")
    if forced in ("reference", "torch"):
        return reference if forced == "reference" else torch
    on_cuda = bool(tensors) and tensors[0] is not None and tensors[0].is_cuda
    if forced == "triton" and not on_cuda and not interpreted():
        raise ValueError(
            "NANOHYBRID_KERNELS is 'triton' and the tensors are on a CPU; "
            "set TRITON_INTERPRET=1 too, or use a GPU"
        )
    kernel = triton if forced == "triton" or (on_cuda and not forced and _has_triton()) else None
    on_cpu = not on_cuda and not (
        tensors and tensors[0] is not None and tensors[0].device.type != "cpu"
    )  # meta tensors have no memory
    if on_cpu and forced in ("", "numba"):
        kernel = numba
    if kernel is None or not kernel.supports(tensors):
        return torch
    return kernel.opaque if "torch._dynamo" in sys.modules else kernel.function


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on a CPU.

    Triton reads the variable when a kernel is defined.
    """
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")


def runs_triton() -> bool:
    """Whether ops on CUDA tensors run their Triton forms, where they have one."""
    return os.environ.get("NANOHYBRID_KERNELS", "") in ("", "triton") and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether Triton is installed. torch for CUDA depends on it on Linux only."""
    return find_spec("triton") is not None
