"""The numba form of the SSD scan, an autograd function over ops/numba/ssd_scan.py.

T tokens · S sequences · H heads · P head dimension · G groups · N state size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.numba import ssd_scan as kernels
from nanohybrid.ops.numba.threads import num_threads, run
from nanohybrid.ops.ssd_scan import torch as torch_form
from nanohybrid.ops.ssd_scan.autograd import Scan
from nanohybrid.ops.ssd_scan.inputs import SSDInputs


def ssd_scan(
    inputs: SSDInputs, layout: Layout, output_final_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """y_THP in fp32, and the final states (None unless `output_final_state`)."""
    dtypes = {inputs.x_THP.dtype, inputs.B_TGN.dtype, inputs.C_TGN.dtype}
    if dtypes not in ({torch.float32}, {torch.bfloat16}) or not layout.tokens:
        return torch_form.ssd_scan(inputs, layout, output_final_state)
    if not wants_gradient(*inputs):
        return _forward(inputs, layout, output_final_state)
    y_THP, final_SHPN = Scan.apply(layout, output_final_state, _forward, _backward, *inputs)
    return y_THP, final_SHPN


def _forward(inputs: SSDInputs, layout: Layout, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    inputs = _prepared(inputs)
    shape, N = inputs.x_THP.shape, inputs.B_TGN.shape[2]
    y_THP = torch.empty(shape, dtype=torch.float32)
    final_SHPN = torch.empty(layout.sequences, *shape[1:], N) if output_final_state else None
    tensors = kernels.ForwardTensors(*_addresses(*inputs), *_addresses(final_SHPN, y_THP))
    run(kernels.scan_forward, *_arguments(inputs, layout, tensors), size=num_threads(_bytes(inputs)))
    return y_THP, final_SHPN


def _backward(dy_THP: Tensor, dfinal_SHPN: Tensor | None, inputs: SSDInputs, layout: Layout) -> SSDInputs:
    inputs = _prepared(inputs)
    x, B, C, initial = inputs.x_THP, inputs.B_TGN, inputs.C_TGN, inputs.initial_SHPN
    (T, H, P), N = x.shape, B.shape[2]
    dy, dfinal = (
        dy_THP.float().contiguous(),
        None if dfinal_SHPN is None else dfinal_SHPN.float().contiguous(),
    )
    dx, ddt = torch.empty(T, H, P, dtype=x.dtype), torch.empty(T, H)
    dB, dC = torch.empty(B.shape, dtype=B.dtype), torch.empty(C.shape, dtype=C.dtype)
    dinitial = None if initial is None else torch.empty(initial.shape)
    dA_SH, dD_SH = torch.empty(layout.sequences, H), torch.empty(layout.sequences, H)
    tensors = kernels.BackwardTensors(
        *_addresses(*inputs), *_addresses(dy, dfinal, dx, ddt, dB, dC, dinitial, dA_SH, dD_SH)
    )
    scratch = kernels.backward_scratch(P, N, layout.max_length)
    run(
        kernels.scan_backward, *_arguments(inputs, layout, tensors), scratch, size=num_threads(_bytes(inputs))
    )
    return SSDInputs(dx, ddt, dA_SH.sum(0), dB, dC, dD_SH.sum(0), dinitial)


def _prepared(inputs: SSDInputs) -> SSDInputs:
    """The inputs as the kernels read them: rows of x, B and C contiguous, the rest contiguous and in fp32."""
    x, dt, A, B, C, D, initial = inputs
    x, B, C = (tensor.detach() for tensor in (x, B, C))
    x, B, C = (tensor if tensor[0].is_contiguous() else tensor.contiguous() for tensor in (x, B, C))
    dt, A, D = (tensor.detach().float().contiguous() for tensor in (dt, A, D))
    return SSDInputs(x, dt, A, B, C, D, None if initial is None else initial.detach().float().contiguous())


def _arguments(inputs: SSDInputs, layout: Layout, tensors: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments of both kernels."""
    x, B, C = inputs.x_THP, inputs.B_TGN, inputs.C_TGN
    (_, H, P), (_, G, N) = x.shape, B.shape
    sizes = kernels.Sizes(H, P, G, N, x.stride(0), B.stride(0), C.stride(0))
    words = [np.array(numbers, dtype=np.int64) for numbers in (layout.starts, sizes, tensors)]
    return layout.sequences, *words, x.dtype == torch.bfloat16


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _bytes(inputs: SSDInputs) -> int:
    """The bytes of state that are read, token by token; they decide on the number of threads."""
    return inputs.x_THP.numel() * inputs.B_TGN.shape[2] * 4
