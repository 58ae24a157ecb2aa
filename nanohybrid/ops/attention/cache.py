"""The keys and values of one layer in pages: in the activations' precision, or in FP8 with scales.

In FP8 a row is x / s in e4m3 with s = max |x| / 448 of that row in bf16: one byte per number and two per row,
where bf16 has two per number. Each row has its own scale, which is written with it and never changes. A scale
per page would have to grow as the page fills.

T tokens · Z sequences · C tokens of context · K key/value heads · P head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.ops.attention import pages
from nanohybrid.ops.layout import Layout

LARGEST = 448.0
SMALLEST = 2.0**-100  # of a scale: a row of zeros must not become 0 / 0


@dataclass(frozen=True)
class PagedCache:
    """key and value [pages, page size, K, P]; in FP8 also their scales [pages, page size, K]."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PagedCache:
        """From a layer's cache tensors by name."""
        scales = tensors.get("key_scale"), tensors.get("value_scale")
        return cls(tensors["key"], tensors["value"], *scales)

    @property
    def quantized(self) -> bool:
        return self.key_scale is not None

    def write(self, k_TKP: Tensor, v_TKP: Tensor, layout: Layout) -> None:
        """Store each token's key and value in its sequence's pages."""
        for pool, scale, rows_TKP in (
            (self.key, self.key_scale, k_TKP),
            (self.value, self.value_scale, v_TKP),
        ):
            if scale is None:
                pages.write(pool, rows_TKP, layout)
            else:
                codes_TKP, scale_TK = quantize(rows_TKP)
                pages.write(pool.view(torch.uint8), codes_TKP.view(torch.uint8), layout)
                pages.write(scale, scale_TK, layout)

    def read(self, layout: Layout, sequences: tuple[int, ...], context: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Z, C, K, P] as pages.read returns them; FP8 is dequantized to fp32."""
        k_ZCKP, v_ZCKP = (
            pages.read(pool, layout, sequences, context)
            if scale is None
            else dequantize(
                pages.read(pool.view(torch.uint8), layout, sequences, context),
                pages.read(scale, layout, sequences, context),
            )
            for pool, scale in ((self.key, self.key_scale), (self.value, self.value_scale))
        )
        return k_ZCKP, v_ZCKP


def quantize(rows_TKP: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes and a bf16 scale for each row. NaN stays NaN."""
    rows_TKP = rows_TKP.float()
    scale_TK = (rows_TKP.abs().amax(-1) / LARGEST).clamp(min=SMALLEST).bfloat16()
    # The scale may have been rounded down, so codes are clamped.
    codes_TKP = (rows_TKP / scale_TK.float()[..., None]).clamp(-LARGEST, LARGEST)
    return codes_TKP.to(torch.float8_e4m3fn), scale_TK


def dequantize(codes_ZCKP: Tensor, scale_ZCK: Tensor) -> Tensor:
    """fp32 from the bytes of e4m3.

    On a CPU by a lookup table: torch's own conversion takes three times as long there.
    """
    if codes_ZCKP.is_cuda:
        rows_ZCKP = codes_ZCKP.view(torch.float8_e4m3fn).float()
    else:
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        rows_ZCKP = table.index_select(0, codes_ZCKP.reshape(-1).int()).view(codes_ZCKP.shape)
    return rows_ZCKP.mul_(scale_ZCK.float()[..., None])
