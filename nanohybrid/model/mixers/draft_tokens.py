"""Tokens that may be taken back: what a Mamba layer keeps of a window of drafts until it is known how many of them stay.

A recurrent state cannot be cut back like keys and values can. The window runs on a copy of the state; what each of its tokens
feeds into it is kept (a few kB a layer, where a state after each token would be megabytes); and once the sampler has spoken the
tokens that stay are fed into the state itself, by the same steps and so with the same bits as if they had come one by one.

Z sequences · L tokens of the longest window · X = W - 1 + L inputs of the conv · C its channels · W its width · H heads · P head
dimension · G groups · N state size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanohybrid.model.mixers.stochastic_rounding import Rounding
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_step.steps import ssd_steps


@dataclass(frozen=True, eq=False)
class Window:
    """One layer's window: the inputs of its conv, the stored ones first, and those of its recurrence."""

    slots: tuple[int, ...]
    conv_ZXC: Tensor
    x_ZLHP: Tensor
    dt_ZLH: Tensor
    A_H: Tensor
    B_ZLGN: Tensor
    C_ZLGN: Tensor
    D_H: Tensor
    rounding: Rounding | None

    def run(self, state_ZHPN: Tensor) -> Tensor:
        """y_ZLHP from the states before the window, which are overwritten: give a copy."""
        return ssd_steps(
            self.x_ZLHP,
            self.dt_ZLH,
            self.A_H,
            self.B_ZLGN,
            self.C_ZLGN,
            self.D_H,
            state_ZHPN,
            _store(self.rounding),
        )[0]

    def settle(self, pools: dict[str, Tensor], rows: Sequence[int], counts: Sequence[int]) -> None:
        """Feed the first `counts` tokens of these rows into their states; other rows stay as they were before the window."""
        device = self.x_ZLHP.device
        rows_R, counts_R1 = torch.tensor(rows, device=device), torch.tensor(counts, device=device)[:, None]
        slots_R = torch.tensor([self.slots[row] for row in rows], device=device)
        before = pools["conv"].shape[1]
        last_RW = counts_R1 + torch.arange(before, device=device)
        pools["conv"].index_copy_(0, slots_R, self.conv_ZXC[rows_R[:, None], last_RW].to(pools["conv"].dtype))
        most = max(counts)
        gone_RL = torch.arange(most, device=device) >= counts_R1
        x_RLHP = self.x_ZLHP[rows_R, :most].masked_fill(gone_RL[..., None, None], 0)
        dt_RLH = self.dt_ZLH[rows_R, :most].masked_fill(gone_RL[..., None], 0)
        B_RLGN = self.B_ZLGN[rows_R, :most].masked_fill(
            gone_RL[..., None, None], 0
        )  # of a draft that broke, not even a NaN stays
        state_RHPN = pools["ssm"].index_select(0, slots_R).to(dt_RLH.dtype)
        store = _store(self.rounding and self.rounding.rows(rows_R))
        _, state_RHPN = ssd_steps(
            x_RLHP, dt_RLH, self.A_H, B_RLGN, self.C_ZLGN[rows_R, :most], self.D_H, state_RHPN, store
        )
        pools["ssm"].index_copy_(0, slots_R, state_RHPN.to(pools["ssm"].dtype))


class Settles(Protocol):
    """A window that waits to be settled."""

    def settle(self, pools: dict[str, Tensor], rows: Sequence[int], counts: Sequence[int]) -> None: ...


class LayerCache(dict[str, Tensor]):
    """The pools of one layer by name, and its window, where one is not settled yet."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window: Settles | None = None


def _store(rounding: Rounding | None) -> Callable[[Tensor, int], Tensor]:
    """What storing a state after a token of the window, and reading it again, makes of it."""
    if rounding is None:
        return lambda state, _: state
    return lambda state, token: rounding.after(state, token).to(state.dtype)


def parts(layout: Layout, device: torch.device) -> list[tuple[Tensor, Layout, bool]]:
    """A layout taken apart into single tokens, prompts, and windows: the rows of each, its layout, whether it is windows."""
    windows = list(layout.speculative)
    others = sorted(set(range(layout.sequences)) - set(windows))
    single = [i for i in others if layout.lengths[i] == 1]
    several = [i for i in others if layout.lengths[i] > 1]
    return [
        (
            torch.from_numpy(np.concatenate([np.arange(*layout.starts[i : i + 2]) for i in some])).to(device),
            layout.select(some),
            some is windows,
        )
        for some in (single, several, windows)
        if some
    ]
