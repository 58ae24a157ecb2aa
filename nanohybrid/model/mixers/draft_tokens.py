"""Draft tokens of speculative decoding in a recurrent layer: the recurrence runs on a copy of the state, and
what is accepted is committed to the state itself.

A recurrent state cannot be truncated like keys and values. So the inputs of each draft token are buffered, a
few kB a layer where a state after each token would be megabytes. When the sampler has decided, the accepted
tokens are fed into the state by the same steps, with the same bits as if they had come one by one.

Z speculative sequences · L tokens of the longest of them · X = W - 1 + L inputs of the conv · C conv channels
· W conv kernel · H heads · P head dimension · G groups · N state size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers.recurrent_state import RecurrentStates
from nanohybrid.model.mixers.stochastic_rounding import Rounding
from nanohybrid.ops.causal_conv import conv_silu
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_step.steps import ssd_steps

Recurrence = Callable[[Tensor, Tensor, Layout, LayerCache | None], Tensor]


def speculative_recurrence(mixer: Any) -> Recurrence:
    """The recurrence of a Mamba2 mixer with draft tokens; single tokens, prompts and drafts run separately."""

    def recurrence(xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        device, y_TD = xBC_TC.device, None
        for rows, part, drafts in layout.memoize(f"parts {device}", lambda: parts(layout, device)):
            form: Recurrence = _draft_form(mixer) if drafts else mixer.recurrence
            y_PD = form(xBC_TC[rows], dt_TH[rows], part, cache)
            y_TD = y_PD.new_empty(len(xBC_TC), y_PD.shape[1]) if y_TD is None else y_TD
            y_TD[rows] = y_PD
        if y_TD is None:
            raise ValueError("a layout needs at least one sequence")
        return y_TD

    return recurrence


def _draft_form(mixer: Any) -> Recurrence:
    """Conv and recurrence of sequences with draft tokens. The cache is not changed; it gets a draft buffer."""

    def recurrence(xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        if cache is None or layout.slots is None:
            raise ValueError("draft tokens need a cache")
        weight_CW, bias_C = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
        dt_TH, A_H, D_H = mixer.discretize(dt_TH)
        states, plan = RecurrentStates(cache, layout), layout.plan(None)
        stored_ZWC = states.initial_or_zeros("conv")
        y_TC, _ = conv_silu(xBC_TC, weight_CW, bias_C, layout, stored_ZWC, output_final_state=False)
        (conv_ZLC,), (dt_ZLH,) = plan.split(xBC_TC), plan.split(dt_TH)
        (x_ZLHP,), (B_ZLGN,), (C_ZLGN,) = map(plan.split, mixer.split(y_TC))
        conv_ZXC = torch.cat([stored_ZWC.to(conv_ZLC.dtype), conv_ZLC], dim=1)
        rounding = Rounding.of(layout, cache.layer, dt_ZLH.device) if "ssm" in cache.rounded else None
        drafts = Mamba2Drafts(layout.slots, conv_ZXC, x_ZLHP, dt_ZLH, A_H, B_ZLGN, C_ZLGN, D_H, rounding)
        cache.drafts = drafts
        return plan.join([drafts.run(states.initial_or_zeros("ssm").clone())]).flatten(-2)

    return recurrence


@dataclass(frozen=True, eq=False)
class Mamba2Drafts:
    """The buffered inputs of one layer's conv, stored ones first, and of its recurrence."""

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
        """y_ZLHP from the states before the drafts, which are overwritten: pass a copy."""
        inputs = self.x_ZLHP, self.dt_ZLH, self.A_H, self.B_ZLGN, self.C_ZLGN, self.D_H
        return ssd_steps(*inputs, state_ZHPN, _store(self.rounding))[0]

    def commit(self, cache: LayerCache, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Feed the first `counts` tokens of these rows into their states; other rows stay as before the drafts."""
        device = self.x_ZLHP.device
        rows_R, counts_R1 = torch.tensor(rows, device=device), torch.tensor(counts, device=device)[:, None]
        slots_R = torch.tensor([self.slots[row] for row in rows], device=device)
        before = cache["conv"].shape[1]
        last_RW = counts_R1 + torch.arange(before, device=device)
        cache["conv"].index_copy_(0, slots_R, self.conv_ZXC[rows_R[:, None], last_RW].to(cache["conv"].dtype))
        most = max(counts)
        rejected_RL = torch.arange(most, device=device) >= counts_R1
        x_RLHP = self.x_ZLHP[rows_R, :most].masked_fill(rejected_RL[..., None, None], 0)
        dt_RLH = self.dt_ZLH[rows_R, :most].masked_fill(rejected_RL[..., None], 0)
        # masked too: of a rejected draft not even a NaN may reach the state
        B_RLGN = self.B_ZLGN[rows_R, :most].masked_fill(rejected_RL[..., None, None], 0)
        state_RHPN = cache["ssm"].index_select(0, slots_R).to(dt_RLH.dtype)
        store = _store(self.rounding and self.rounding.rows(rows_R))
        C_RLGN = self.C_ZLGN[rows_R, :most]
        _, state_RHPN = ssd_steps(x_RLHP, dt_RLH, self.A_H, B_RLGN, C_RLGN, self.D_H, state_RHPN, store)
        cache["ssm"].index_copy_(0, slots_R, state_RHPN.to(cache["ssm"].dtype))


def _store(rounding: Rounding | None) -> Callable[[Tensor, int], Tensor]:
    """What storing a state after a draft token, and reading it again, makes of it."""
    if rounding is None:
        return lambda state, _: state
    return lambda state, token: rounding.after(state, token).to(state.dtype)


def parts(layout: Layout, device: torch.device) -> list[tuple[Tensor, Layout, bool]]:
    """A layout split into single tokens, prompts, and drafts: the rows of each, its layout, whether it is drafts."""
    drafts = list(layout.speculative)
    others = sorted(set(range(layout.sequences)) - set(drafts))
    single = [i for i in others if layout.lengths[i] == 1]
    several = [i for i in others if layout.lengths[i] > 1]
    return [
        (
            torch.from_numpy(np.concatenate([np.arange(*layout.starts[i : i + 2]) for i in some])).to(device),
            layout.select(some),
            some is drafts,
        )
        for some in (single, several, drafts)
        if some
    ]
