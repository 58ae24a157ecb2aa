"""The causal convolution and its SiLU in one pass on a GPU: over a ragged batch, and as a decode step.

T tokens · S sequences · C channels · W window. For each token the kernel knows how many tokens of its
sequence precede it in the batch. So a tap reads either this batch or the inputs of an earlier call. Masked
elements are not read: no value of a neighboring sequence is ever multiplied, not even by zero.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import cdiv, next_power_of_2
from nanohybrid.ops.layout import Layout

TOKENS, CHANNELS = 16, 256  # of a tile


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_TC in fp32 and the last W - 1 inputs of each sequence (None unless `output_final_state`)."""
    return _run(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state, silu=False)


def conv_silu(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """silu(y_TC) in the dtype of x, and the last W - 1 inputs of each sequence (None unless
    `output_final_state`).
    """
    return _run(x_TC, weight_CW, bias_C, layout, initial_SWC, output_final_state, silu=True)


def _run(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None,
    output_final_state: bool,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    (T, C), W, S = x_TC.shape, weight_CW.shape[1], layout.sequences
    x_TC = x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
    weight_CW = weight_CW.contiguous()
    initial = None if initial_SWC is None else initial_SWC.contiguous()
    y_TC = x_TC.new_empty(T, C, dtype=x_TC.dtype if silu else torch.float32)
    width = min(CHANNELS, next_power_of_2(C))
    before_T, sequence_T = _token_tables(layout, x_TC.device)
    grid = (cdiv(T, TOKENS), cdiv(C, width))
    shared = {"W": W, "HAS_INITIAL": initial is not None, "CHANNELS": width}
    _conv[grid](
        x_TC,
        weight_CW,
        bias_C,
        initial,
        y_TC,
        before_T,
        sequence_T,
        T,
        C,
        x_TC.stride(0),
        SILU=silu,
        TOKENS=TOKENS,
        **shared,
    )
    if not output_final_state:
        return y_TC, None
    last_SWC = x_TC.new_empty(S, W - 1, C)
    starts = layout.tensor("starts", x_TC.device, lambda: np.asarray(layout.starts, dtype=np.int64))
    _last_inputs[(S, cdiv(C, width))](x_TC, initial, last_SWC, starts, C, x_TC.stride(0), **shared)
    return y_TC, last_SWC


def _token_tables(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [T] each: how many tokens of its sequence precede a token, and the index of its sequence."""
    before_T = layout.tensor("before", device, layout.offsets)
    return before_T, layout.tensor(
        "sequence", device, lambda: np.repeat(np.arange(layout.sequences), layout.lengths)
    )


def conv_silu_step(
    x_SC: Tensor, weight_CW: Tensor, bias_C: Tensor, pool: Tensor, slots_S: Tensor, positions_S: Tensor
) -> Tensor:
    """silu(y_SC) for one token of each sequence, in the dtype of x.

    The rows `slots_S` of pool [slots, W - 1, C] are advanced by it.

    A sequence at position 0 starts from zeros, whatever its slot holds.
    """
    S, C = x_SC.shape
    y_SC = x_SC.new_empty(S, C)
    width = min(CHANNELS, next_power_of_2(C))
    W = weight_CW.shape[1]
    _step[(S, cdiv(C, width))](
        x_SC,
        weight_CW.contiguous(),
        bias_C,
        pool,
        y_SC,
        slots_S,
        positions_S,
        C,
        x_SC.stride(0),
        W=W,
        CHANNELS=width,
    )
    return y_SC


@triton.jit
def _conv(
    x, weight, bias, initial, y, before_T, sequence_T, T, C, stride, W: tl.constexpr, HAS_INITIAL:
    tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_token, is_channel = t < T, c < C
    before = tl.load(before_T + t, mask=is_token, other=0)
    sequence = tl.load(sequence_T + t, mask=is_token, other=0)
    total = (
        tl.zeros([TOKENS, CHANNELS], tl.float32)
        + tl.load(bias + c, mask=is_channel, other=0).to(tl.float32)[None, :]
    )
    for k in tl.static_range(W):  # the distance back
        is_in_batch = is_token & (before >= k)
        value = tl.load(
            x + (t - k).to(tl.int64)[:, None] * stride + c[None, :],
            mask=is_in_batch[:, None] & is_channel[None, :],
            other=0,
        )
        value = value.to(tl.float32)
        if HAS_INITIAL and k > 0:
            row = sequence * (W - 1) + (W - 1 + before - k)
            is_in_initial = (is_token & (before < k))[:, None] & is_channel[None, :]
            value += tl.load(initial + row[:, None] * C + c[None, :], mask=is_in_initial, other=0).to(
                tl.float32
            )
        total += (
            value * tl.load(weight + c * W + (W - 1 - k), mask=is_channel, other=0).to(tl.float32)[None, :]
        )
    if SILU:
        total = total / (1 + tl.exp(-total))
    tl.store(
        y + t.to(tl.int64)[:, None] * C + c[None, :],
        total.to(y.dtype.element_ty),
        mask=is_token[:, None] & is_channel[None, :],
    )


@triton.jit
def _last_inputs(
    x, initial, last, starts, C, stride, W: tl.constexpr, HAS_INITIAL: tl.constexpr, CHANNELS: tl.constexpr
):
    """The last W - 1 inputs of a sequence, with inputs of earlier calls where it is shorter."""
    sequence = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    for i in tl.static_range(W - 1):
        row = end - (W - 1) + i
        value = tl.load(x + row * stride + c, mask=(row >= begin) & (c < C), other=0)
        if HAS_INITIAL:
            old = sequence.to(tl.int64) * (W - 1) + (end - begin) + i
            value += tl.load(initial + old * C + c, mask=(row < begin) & (c < C), other=0).to(value.dtype)
        tl.store(last + (sequence.to(tl.int64) * (W - 1) + i) * C + c, value, mask=c < C)


@triton.jit
def _step(x, weight, bias, pool, y, slots_S, positions_S, C, stride, W: tl.constexpr, CHANNELS: tl.constexpr):
    sequence = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = c < C
    fresh = tl.load(positions_S + sequence) == 0
    slot = pool + tl.load(slots_S + sequence) * (W - 1) * C + c
    new = tl.load(x + sequence.to(tl.int64) * stride + c, mask=is_channel, other=0)
    total = tl.load(bias + c, mask=is_channel, other=0).to(tl.float32)
    total += new.to(tl.float32) * tl.load(weight + c * W + (W - 1), mask=is_channel, other=0).to(tl.float32)
    # A thread reads and writes only its own channels, and reads each row before it is overwritten.
    for i in tl.static_range(W - 1):
        value = tl.load(slot + i * C, mask=is_channel & (not fresh), other=0)
        total += value.to(tl.float32) * tl.load(weight + c * W + i, mask=is_channel, other=0).to(tl.float32)
        if i > 0:
            tl.store(slot + (i - 1) * C, value, mask=is_channel)
    tl.store(slot + (W - 2) * C, new.to(pool.dtype.element_ty), mask=is_channel)
    tl.store(
        y + sequence.to(tl.int64) * C + c,
        (total / (1 + tl.exp(-total))).to(y.dtype.element_ty),
        mask=is_channel,
    )
