"""The Mamba-2 mixer (Dao & Gu 2024; paper, section 2.1).

    z | x B C | dt = in_proj(u)
    x B C = silu(causal conv(x B C));   dt = softplus(dt + dt_bias);   A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;   y_t = S_t C_t + D x_t
    out = out_proj(group norm(y * silu(z)))

T tokens · S sequences · E hidden size · D inner size H * P · H heads · P head dimension · G groups · N state
size · C conv channels · W conv kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanohybrid.errors import ConfigError, shown
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers.axes import Outer, Stack
from nanohybrid.model.mixers.base import Mixer, Weights
from nanohybrid.model.mixers.checks import check_divides, check_float32, is_number
from nanohybrid.model.mixers.declarations import (
    CacheSpec,
    CpuKernel,
    InnerActivation,
    LayerFields,
    MixerSpec,
    PrunableAxis,
    width,
)
from nanohybrid.model.mixers.draft_tokens import speculative_recurrence
from nanohybrid.model.mixers.recurrent_state import RecurrentStates
from nanohybrid.ops.causal_conv import conv_silu
from nanohybrid.ops.gated_norm import gated_norm
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.mamba_step import mamba_step
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.ops.ssd_scan import ssd_scan
from nanohybrid.ops.ssd_step import ssd_step

INNER = Outer("mamba_num_heads", "mamba_head_dim")
GROUPED = Outer("n_groups", "ssm_state_size")
CONV = Stack(INNER, GROUPED, GROUPED)


@dataclass(frozen=True, kw_only=True)
class Mamba2Fields(LayerFields):
    """What Mamba-2 reads of the configuration."""

    mamba_num_heads: int = width(128)
    mamba_head_dim: int = width(80)
    n_groups: int = width(8)
    ssm_state_size: int = width(128)
    conv_kernel: int = 4
    chunk_size: int = 128
    """Only written to the checkpoint: our chunks are always 128 tokens, and results do not depend on it."""
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4

    @property
    def mamba_inner_size(self) -> int:
        """D: channels of all heads together."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_cache_length(self) -> int:
        """W - 1: inputs of the conv that a sequence keeps."""
        return self.conv_kernel - 1

    @property
    def recurrence_inputs(self) -> int:
        """Numbers a token that enter the conv and the recurrence: x, B, C and dt."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size + self.mamba_num_heads


class Mamba2(Mixer[Mamba2Fields]):
    """The recurrent mixer.

    Its state is the last W - 1 inputs of the conv and one [H, P, N] matrix a sequence, in fp32.
    """

    symbol = "M"
    label = "Mamba-2"
    color = "#2f81d6"
    fields = Mamba2Fields
    block_types = ("mamba", "mamba2", "linear_attention")
    gguf_names: ClassVar[dict[str, str]] = {
        "in_proj.weight": "ssm_in.weight", "conv1d.weight": "ssm_conv1d.weight", "conv1d.bias": "ssm_conv1d.bias",
        "dt_bias": "ssm_dt.bias", "A_log": "ssm_a", "D": "ssm_d", "norm.weight": "ssm_norm.weight",
        "out_proj.weight": "ssm_out.weight",
    }  # fmt: skip
    prunable = (
        PrunableAxis("mamba_num_heads", "--mamba-heads", "Mamba heads", groups="n_groups", fractions=(1.0,)),
        PrunableAxis(
            "mamba_head_dim", "--mamba-head-dim", "channels of a Mamba head", shared=True, multiple=True
        ),
    )
    cuda_graphs = True
    commits_drafts = True
    activation = InnerActivation(  # in_proj's output is z | x B C | dt: these are the columns of x
        "in_proj", "output", ("mamba_num_heads", "mamba_head_dim"), writer="out_proj",
        columns=lambda config: (config.mamba_inner_size, 2 * config.mamba_inner_size),
    )  # fmt: skip

    in_proj: nn.Linear
    conv1d: Weights
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Weights
    out_proj: nn.Linear

    @classmethod
    def declare(cls, config: Mamba2Fields) -> MixerSpec:
        return MixerSpec(
            parameters={
                "in_proj.weight": (Stack(INNER, INNER, GROUPED, GROUPED, "mamba_num_heads"), "hidden_size"),
                "conv1d.weight": (CONV, 1, "conv_kernel"),
                "conv1d.bias": (CONV,),
                "dt_bias": ("mamba_num_heads",),
                "A_log": ("mamba_num_heads",),
                "D": ("mamba_num_heads",),
                "norm.weight": (INNER,),
                "out_proj.weight": ("hidden_size", INNER),
            },
            cache={
                "conv": CacheSpec(("conv_cache_length", CONV), "recurrent"),
                "ssm": CacheSpec(
                    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"), "recurrent", torch.float32
                ),
            },
        )

    def forward(self, x_TE: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        config = self.config
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        z_TD, xBC_TC, dt_TH = self.in_proj(x_TE).split(
            [inner, config.recurrence_inputs - heads, heads], dim=-1
        )
        recur = self.recurrence if not layout.speculative else speculative_recurrence(self)
        y_TD = recur(xBC_TC, dt_TH, layout, cache)
        y_TD = gated_norm(y_TD, z_TD, self.norm.weight, config.n_groups, config.layer_norm_epsilon)
        return self.out_proj(y_TD)

    def recurrence(self, xBC_TC: Tensor, dt_TH: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        """Conv and SSD recurrence of a layout without draft tokens: y [T, D].

        The cache is brought up to date.
        """
        is_step = cache is not None and layout.is_decode
        if is_step and (y_THP := self.fused_step(xBC_TC, dt_TH, layout, cache)) is not None:
            return y_THP.flatten(-2)
        states = RecurrentStates(cache, layout)
        ssm_SHPN: Tensor | None
        keep = cache is not None
        weight_CW, bias_C = self.conv1d.weight[:, 0], self.conv1d.bias
        xBC_TC, conv_SWC = conv_silu(xBC_TC, weight_CW, bias_C, layout, states.initial("conv"), keep)
        x_THP, B_TGN, C_TGN = self.split(xBC_TC)
        dt_TH, A_H, D_H = self.discretize(dt_TH)
        if is_step:
            y_THP, ssm_SHPN = ssd_step(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, states.initial_or_zeros("ssm"))
        else:
            y_THP, ssm_SHPN = ssd_scan(
                x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, layout, states.initial("ssm"), keep
            )
        states.store("conv", conv_SWC)
        states.store("ssm", ssm_SHPN)
        return y_THP.flatten(-2)

    def fused_step(
        self, xBC_SC: Tensor, dt_SH: Tensor, layout: Layout, cache: LayerCache | None
    ) -> Tensor | None:
        """y [S, H, P] of a decode step by the one kernel that does all of it; None where the device has none."""
        if cache is None or "ssm" in cache.rounded:  # the kernel does not round stochastically
            return None
        config, conv = self.config, self.conv1d
        return mamba_step(
            xBC_SC, dt_SH, conv.weight[:, 0], conv.bias, self.dt_bias, self.A_log, self.D, cache["conv"], cache["ssm"],
            layout, config.n_groups, config.time_step_limit,
        )  # fmt: skip

    def split(self, xBC_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H, P], B and C [T, G, N] of the conv's output."""
        config = self.config
        inner, grouped = config.mamba_inner_size, config.n_groups * config.ssm_state_size
        x_TD, B_TM, C_TM = xBC_TC.split([inner, grouped, grouped], dim=-1)
        x_THP = x_TD.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim))
        B_TGN, C_TGN = (m.unflatten(-1, (config.n_groups, config.ssm_state_size)) for m in (B_TM, C_TM))
        return x_THP, B_TGN, C_TGN

    def discretize(self, dt_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes dt [T, H], decay rates A [H] and skip weights D [H], in fp32 (float64 for float64)."""
        dtype = torch.promote_types(dt_TH.dtype, torch.float32)
        dt_TH = F.softplus(dt_TH.to(dtype) + self.dt_bias.to(dtype))
        low, high = self.config.time_step_limit
        if low > 0 or high < math.inf:
            dt_TH = dt_TH.clamp(low, high)
        return dt_TH, -self.A_log.to(dtype).exp(), self.D.to(dtype)

    @classmethod
    def check(cls, config: Mamba2Fields) -> None:
        check_divides(config, "mamba_num_heads", "n_groups")
        low, high = config.time_step_min, config.time_step_max
        if low > high:
            raise ConfigError(
                f"time_step_min is {low} and time_step_max {high}: the first must be no more than the second"
            )
        limit: Any = config.time_step_limit
        two_numbers = isinstance(limit, tuple) and len(limit) == 2 and all(map(is_number, limit))
        if two_numbers:
            check_float32("the lower bound of time_step_limit", limit[0])
            if limit[1] != math.inf:
                check_float32("the upper bound of time_step_limit", limit[1], fix="Infinity means no limit")
        if not two_numbers or not limit[0] <= limit[1]:
            raise ConfigError(f"time_step_limit is {shown(limit)}: it must be two numbers, the smaller first")

    @classmethod
    def official(cls, config: Mamba2Fields) -> bool:
        return True

    @classmethod
    def describe(cls, config: Mamba2Fields) -> str:
        heads = f"{config.mamba_num_heads} heads x {config.mamba_head_dim}"
        return f"{heads}, {config.n_groups} groups, state {config.ssm_state_size}, conv {config.conv_kernel}"

    @classmethod
    def small(cls, config: Mamba2Fields) -> dict[str, Any]:
        groups = min(config.n_groups, 2)
        heads = groups * min(config.mamba_num_heads // max(config.n_groups, 1), 2)
        sizes = dict(
            mamba_head_dim=min(config.mamba_head_dim, 20), ssm_state_size=min(config.ssm_state_size, 16)
        )
        return dict(n_groups=groups, mamba_num_heads=heads, **sizes)

    @classmethod
    def mixing_flops(cls, config: Mamba2Fields, tokens: int, position: int) -> int:
        return 5 * tokens * cls.chunk_numbers(config)

    @classmethod
    def transient_numbers(cls, config: Mamba2Fields) -> int:
        """Projected, convolved and regrouped inputs; the decays and scores of a round of chunks."""
        heads, inner = config.mamba_num_heads, config.mamba_inner_size
        projected = inner + config.recurrence_inputs
        return 4 * projected + heads * CHUNK * 4 + 3 * inner

    @classmethod
    def draft_numbers(cls, config: Mamba2Fields, drafts: int) -> int:
        """The conv's inputs and the recurrence's, of each draft token and of the conv's cache."""
        return 2 * (drafts + config.conv_kernel) * config.recurrence_inputs

    @classmethod
    def saved_bytes(cls, config: Mamba2Fields, narrow: int) -> int:
        """in_proj's output, the conv's, the gated norm's; in fp32 the scan's y, and dt before and after softplus."""
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        projected, convolved = inner + config.recurrence_inputs, config.recurrence_inputs - heads
        return narrow * (config.hidden_size + projected + convolved + inner) + 4 * (inner + 2 * heads)

    @classmethod
    def initial(cls, config: Mamba2Fields, name: str, parameter: Tensor, generator: torch.Generator) -> bool:
        """Mamba-2's rules: A in [1, 16], step sizes log-uniform between time_step_min and time_step_max."""
        if name == "D":
            parameter.fill_(1.0)
        elif name == "A_log":
            parameter.copy_(torch.empty(parameter.shape).uniform_(1, 16, generator=generator).log())
        elif name == "dt_bias":
            parameter.copy_(_initial_dt_bias(parameter.shape, config, generator))
        elif name.startswith("conv1d."):
            bound = config.conv_kernel**-0.5
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            return False
        return True

    def cpu_kernel(self) -> CpuKernel | None:
        taps_WC = self.conv1d.weight.detach()[:, 0].float().T
        decay_H = -self.A_log.detach().float().exp()
        vectors = (taps_WC, self.conv1d.bias, self.dt_bias, decay_H, self.D, self.norm.weight)
        return CpuKernel("mamba2", ("in_proj", "out_proj"), ("conv", "ssm"), vectors)


def _initial_dt_bias(shape: torch.Size, config: Mamba2Fields, generator: torch.Generator) -> Tensor:
    """The inverse softplus of log-uniform step sizes."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = torch.empty(shape).uniform_(low, high, generator=generator).exp().clamp(min=config.time_step_floor)
    return dt + torch.log(-torch.expm1(-dt))
