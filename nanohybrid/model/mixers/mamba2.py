"""The Mamba-2 mixer (Dao & Gu 2024; paper, section 2.1).

in_proj -> z | x B C | dt;  x B C through a causal conv and SiLU;  dt = softplus(dt + dt_bias);  A = -exp(A_log);
y = SSD scan;  y = group norm(y silu(z));  out_proj.

T tokens · S sequences · E embedding · H heads · P head dimension · G groups · N state size · C conv channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers.axes import Declaration, Outer, Stack, StateSpec
from nanohybrid.model.mixers.base import Mixer, Weights
from nanohybrid.model.mixers.draft_tokens import LayerCache, Window, parts
from nanohybrid.model.mixers.stochastic_rounding import Rounding
from nanohybrid.ops.causal_conv import conv_silu
from nanohybrid.ops.gated_norm import gated_norm
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.mamba_step import mamba_step
from nanohybrid.ops.ssd_scan import ssd_scan
from nanohybrid.ops.ssd_step import ssd_step

INNER = Outer("mamba_heads", "mamba_channels")
GROUPED = Outer("groups", "ssm_state")
CONV = Stack(INNER, GROUPED, GROUPED)


class Mamba2(Mixer):
    """The recurrent mixer. Its state is the last W - 1 inputs of the conv and one [H, P, N] matrix a sequence, in fp32."""

    in_proj: nn.Linear
    conv1d: Weights
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Weights
    out_proj: nn.Linear

    @staticmethod
    def declare(config: HybridConfig) -> Declaration:
        return Declaration(
            parameters={
                "in_proj.weight": (Stack(INNER, INNER, GROUPED, GROUPED, "mamba_heads"), "embedding"),
                "conv1d.weight": (CONV, "one", "conv_window"),
                "conv1d.bias": (CONV,),
                "dt_bias": ("mamba_heads",),
                "A_log": ("mamba_heads",),
                "D": ("mamba_heads",),
                "norm.weight": (INNER,),
                "out_proj.weight": ("embedding", INNER),
            },
            states={
                "conv": StateSpec(("conv_context", CONV), per_token=False, dtype=None),
                "ssm": StateSpec(
                    ("mamba_heads", "mamba_channels", "ssm_state"), per_token=False, dtype=torch.float32
                ),
            },
        )

    def forward(self, x_TE: Tensor, layout: Layout, state: dict[str, Tensor] | None) -> Tensor:
        config = self.config
        inner, grouped = config.mamba_inner_size, config.n_groups * config.ssm_state_size
        z_TD, xBC_TC, dt_TH = self.in_proj(x_TE).split(
            [inner, inner + 2 * grouped, config.mamba_num_heads], dim=-1
        )
        recur = self._in_parts if layout.speculative else self._recur
        y_TD = gated_norm(
            recur(xBC_TC, dt_TH, layout, state),
            z_TD,
            self.norm.weight,
            config.n_groups,
            config.layer_norm_epsilon,
        )
        return self.out_proj(y_TD)

    def _recur(
        self, xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, state: dict[str, Tensor] | None
    ) -> Tensor:
        """Conv and recurrence; y_TD."""
        y_THP = self._fused_step(xBC_TC, dt_TH, layout, state)
        return (self._scan(xBC_TC, dt_TH, layout, state) if y_THP is None else y_THP).flatten(-2)

    def _fused_step(
        self, xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, state: dict[str, Tensor] | None
    ) -> Tensor | None:
        """y of a decode step in one go on the pools, where there are kernels for it."""
        if (
            state is None or not layout.is_decode or state["ssm"].dtype == torch.float16
        ):  # no kernel rounds stochastically
            return None
        config, conv = self.config, self.conv1d
        parameters = conv.weight[:, 0], conv.bias, self.dt_bias, self.A_log, self.D
        return mamba_step(
            xBC_TC,
            dt_TH,
            *parameters,
            state["conv"],
            state["ssm"],
            layout,
            config.n_groups,
            config.time_step_limit,
        )

    def _scan(self, xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, state: dict[str, Tensor] | None) -> Tensor:
        """y of any layout, op by op; states are read from the pools and written back."""
        dt_TH, A_H, D_H = self._steps(dt_TH)
        carried, keep = _Carried(state, layout), state is not None
        xBC_TC, conv_SWC = conv_silu(
            xBC_TC, self.conv1d.weight[:, 0], self.conv1d.bias, layout, carried.read("conv"), keep
        )
        x_THP, B_TGN, C_TGN = self._features(xBC_TC)
        y_THP: Tensor
        ssm_SHPN: Tensor | None
        if layout.is_decode and state is not None:
            y_THP, ssm_SHPN = ssd_step(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, carried.read_or_zeros("ssm"))
        else:
            y_THP, ssm_SHPN = ssd_scan(
                x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, carried.read("ssm"), keep
            )
        carried.write("conv", conv_SWC)
        carried.write("ssm", ssm_SHPN)
        return y_THP

    def _in_parts(
        self, xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, state: dict[str, Tensor] | None
    ) -> Tensor:
        """`_recur` for a batch with windows of drafts: they, single tokens and prompts each in the form that suits them."""
        y_TD = None
        for rows, part, windows in layout.memoize(
            f"parts {xBC_TC.device}", lambda: parts(layout, xBC_TC.device)
        ):
            y_PD = (self._window if windows else self._recur)(xBC_TC[rows], dt_TH[rows], part, state)
            y_TD = y_PD.new_empty(len(xBC_TC), y_PD.shape[1]) if y_TD is None else y_TD
            y_TD[rows] = y_PD
        assert y_TD is not None
        return y_TD

    def _window(
        self, xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, state: dict[str, Tensor] | None
    ) -> Tensor:
        """Conv and recurrence of sequences whose tokens may be taken back: states are read, and left as they are; y_TD."""
        assert isinstance(state, LayerCache) and layout.slots is not None
        dt_TH, A_H, D_H = self._steps(dt_TH)
        carried, plan = _Carried(state, layout), layout.plan(None)
        stored_ZWC = carried.read_or_zeros("conv")
        y_TC, _ = conv_silu(
            xBC_TC, self.conv1d.weight[:, 0], self.conv1d.bias, layout, stored_ZWC, keep=False
        )
        (conv_ZLC,), (dt_ZLH,) = plan.split(xBC_TC), plan.split(dt_TH)
        (x_ZLHP,), (B_ZLGN,), (C_ZLGN,) = map(plan.split, self._features(y_TC))
        conv_ZXC = torch.cat([stored_ZWC.to(conv_ZLC.dtype), conv_ZLC], dim=1)
        rounding = (
            Rounding.of(layout, state.layer, dt_ZLH.device) if state["ssm"].dtype == torch.float16 else None
        )
        state.window = Window(layout.slots, conv_ZXC, x_ZLHP, dt_ZLH, A_H, B_ZLGN, C_ZLGN, D_H, rounding)
        return plan.join([state.window.run(carried.read_or_zeros("ssm").clone())]).flatten(-2)

    def _features(self, xBC_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_THP, B_TGN and C_TGN of what left the conv."""
        config = self.config
        inner, grouped = config.mamba_inner_size, config.n_groups * config.ssm_state_size
        x_TD, B_TM, C_TM = xBC_TC.split([inner, grouped, grouped], dim=-1)
        x_THP = x_TD.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim))
        B_TGN, C_TGN = (m.unflatten(-1, (config.n_groups, config.ssm_state_size)) for m in (B_TM, C_TM))
        return x_THP, B_TGN, C_TGN

    def _steps(self, dt_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes, decay rates and skip weights in fp32 (float64 for float64)."""
        dtype = torch.promote_types(dt_TH.dtype, torch.float32)
        dt_TH = F.softplus(dt_TH.to(dtype) + self.dt_bias.to(dtype))
        low, high = self.config.time_step_limit
        if low > 0 or high < math.inf:
            dt_TH = dt_TH.clamp(low, high)
        return dt_TH, -self.A_log.to(dtype).exp(), self.D.to(dtype)


class _Carried:
    """The states of a batch's sequences in their pools: read as [S, ...], written back in place.

    Sequences in neighboring slots are read as a view, so that the decode step updates the pool itself.
    """

    def __init__(self, pools: dict[str, Tensor] | None, layout: Layout) -> None:
        self._pools, self._layout, self._run = pools, layout, layout.slot_run

    def read(self, name: str) -> Tensor | None:
        """[S, ...] with zeros for the sequences that begin here; None where all do."""
        if self._pools is None or not self._layout.continues:
            return None
        pool = self._pools[name]
        rows = (
            pool[self._run]
            if self._run is not None
            else pool.index_select(0, self._layout.slot_index(pool.device))
        )
        if len(self._layout.continues) < self._layout.sequences:
            fresh = self._layout.fresh_mask(pool.device).view(-1, *[1] * (rows.ndim - 1))
            rows = rows.masked_fill(fresh, 0)
        return rows.float() if name == "ssm" and rows.dtype == torch.float16 else rows

    def read_or_zeros(self, name: str) -> Tensor:
        """As `read`, with zeros in place of None."""
        rows = self.read(name)
        assert self._pools is not None
        if rows is None:
            rows = self._pools[name].new_zeros(self._layout.sequences, *self._pools[name].shape[1:])
        return rows.float() if name == "ssm" and rows.dtype == torch.float16 else rows

    def write(self, name: str, rows: Tensor | None) -> None:
        """Store [S, ...] at the slots; nothing to do in training, or where `rows` is the pool's own memory."""
        if self._pools is None or rows is None:
            return
        pool = self._pools[name]
        if name == "ssm" and pool.dtype == torch.float16:
            assert isinstance(self._pools, LayerCache)
            rows = Rounding.of(self._layout, self._pools.layer, rows.device).after(rows, -1)
        if self._run is None:
            pool.index_copy_(0, self._layout.slot_index(pool.device), rows.to(pool.dtype))
        elif rows.data_ptr() != pool[self._run].data_ptr():
            pool[self._run].copy_(rows)
