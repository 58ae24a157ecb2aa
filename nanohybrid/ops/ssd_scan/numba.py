"""The scan's loops for CPUs (ops/numba/ssd_scan.py) with their gradient, as autograd wants them.

T tokens · S sequences · H heads · P head dimension · G groups · N state size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.dispatch import wants_gradient
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.numba import ssd_scan as scan
from nanohybrid.ops.numba.threads import num_threads, run
from nanohybrid.ops.ssd_scan import torch as torch_form
from nanohybrid.ops.ssd_scan.autograd import Scan


def ssd_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    D_H: Tensor,
    layout: Layout,
    initial_SHPN: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_THP in fp32, and the final states (None unless `keep`)."""
    one = x_THP.dtype if x_THP.dtype == B_TGN.dtype == C_TGN.dtype else None
    if one not in (torch.float32, torch.bfloat16) or not layout.tokens:
        return torch_form.ssd_scan(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, initial_SHPN, keep)
    if not wants_gradient(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN):
        return _forward(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, initial_SHPN, keep)
    y_THP, final_SHPN = Scan.apply(
        x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN, layout, keep, _forward, _backward
    )
    return y_THP, final_SHPN


def _forward(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, C_TGN: Tensor, D_H: Tensor, layout: Layout,
    initial_SHPN: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    x, dt, A, B, C, D, initial = _prepared(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN)
    y_THP = torch.empty(x.shape, dtype=torch.float32)
    final_SHPN = torch.empty(layout.sequences, *x.shape[1:], B.shape[2]) if keep else None
    at = _addresses(x, dt, A, B, C, D, initial, final_SHPN, y_THP)
    run(
        scan.scan_forward,
        layout.sequences,
        _starts(layout),
        _sizes(x, B, C),
        at,
        x.dtype == torch.bfloat16,
        size=num_threads(_work(x, B)),
    )
    return y_THP, final_SHPN


def _backward(
    dy_THP: Tensor, dfinal_SHPN: Tensor | None, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, C_TGN: Tensor, D_H: Tensor,
    layout: Layout, initial_SHPN: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, dt, A, B, C, D, initial = _prepared(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN)
    (T, H, P), N = x.shape, B.shape[2]
    dfinal = None if dfinal_SHPN is None else dfinal_SHPN.float().contiguous()
    dx, ddt = torch.empty(T, H, P, dtype=x.dtype), torch.empty(T, H)
    dB, dC = torch.empty(B.shape, dtype=B.dtype), torch.empty(C.shape, dtype=C.dtype)
    dinitial = None if initial is None else torch.empty(initial.shape)
    dA_SH, dD_SH = torch.empty(layout.sequences, H), torch.empty(layout.sequences, H)
    given = x, dt, A, B, C, D, initial, dy_THP.float().contiguous(), dfinal
    at = _addresses(*given, dx, ddt, dB, dC, dinitial, dA_SH, dD_SH)
    room = scan.backward_scratch(P, N, layout.max_length)
    run(
        scan.scan_backward,
        layout.sequences,
        _starts(layout),
        _sizes(x, B, C),
        at,
        x.dtype == torch.bfloat16,
        room,
        size=num_threads(_work(x, B)),
    )
    return dx, ddt, dA_SH.sum(0), dB, dC, dD_SH.sum(0), dinitial


def _prepared(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None
) -> tuple[Any, ...]:
    """The inputs as the loops read them: heads and states side by side within a token, the rest in fp32 and whole."""
    whole = [None if one is None else one.detach().float().contiguous() for one in (dt, A, D, initial)]
    x, B, C = (one.detach() if one[0].is_contiguous() else one.detach().contiguous() for one in (x, B, C))
    return x, whole[0], whole[1], B, C, whole[2], whole[3]


def _starts(layout: Layout) -> np.ndarray:
    return np.asarray(layout.starts, dtype=np.int64)


def _sizes(x: Tensor, B: Tensor, C: Tensor) -> np.ndarray:
    return np.array([*x.shape[1:], *B.shape[1:], x.stride(0), B.stride(0), C.stride(0)], dtype=np.int64)


def _addresses(*tensors: Tensor | None) -> np.ndarray:
    return np.array([0 if one is None else one.data_ptr() for one in tensors], dtype=np.int64)


def _work(x: Tensor, B: Tensor) -> int:
    """What decides on threads: the states' bytes that go by, a token after another."""
    return x.numel() * B.shape[2] * 4
