"""Kernels for the gradients of the states at chunk borders: what each chunk adds to one, and their backward
pass along a sequence.

    dS_before = exp(c_Q) dS_after + sum_i exp(c_i) dy_i C_i^T

A state is processed as rows (head, channel) of N numbers. The 16 heads of 80 of a group are 1,280 rows,
twenty whole tiles, where one tile per head would be 80 rows of 128. Only the decay of a row depends on its
head.

Z chunks · Q tokens of a chunk · H heads · P head dimension · G groups · N state size · R rows (head, channel)
of a group.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_state_gradients(
    dy, c, C, out, table, stride_C, Z, H, G, P: tl.constexpr, N: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [Z, H P, N]: sum_i exp(c_i) dy_i C_i^T, for the chunks that a state enters."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    if tl.load(table + 2 * Z + chunk) == 0:
        return
    start, length = tl.load(table + chunk), tl.load(table + Z + chunk)
    rows = H // G * P
    r, n = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    head = group * (H // G) + r // P
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, length, BLOCK_Q):
        i = first + tl.arange(0, BLOCK_Q)
        token = start + i
        inside = (r < rows)[:, None] & (i < length)[None, :]
        factor = tl.exp(tl.load(c + token[None, :] * H + head[:, None], mask=inside, other=0.0))
        dy_RQ = tl.load(dy + token[None, :] * H * P + (group * rows + r)[:, None], mask=inside, other=0.0).to(
            tl.float32
        )
        C_QN = tl.load(
            C + token[:, None] * stride_C + group * N + n[None, :],
            mask=(i < length)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        total = tl.dot((dy_RQ * factor).to(OPERAND), C_QN.to(OPERAND), total, input_precision="ieee")
    at = (chunk.to(tl.int64) * G + group) * rows * N + r[:, None] * N + n[None, :]
    tl.store(out + at, total, mask=(r < rows)[:, None] & (n < N)[None, :])


@triton.jit
def state_passing_backward(
    states, c, table, bounds, final, initial, Z, H, SIZE, P: tl.constexpr, N: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In `states` [Z, H P, N], replace what each chunk adds by the gradient of the state after it, from a
    sequence's last chunk to its first.

    Starts from `final` [S, H P, N] or zeros; the gradient of the first state goes to `initial`.
    """
    sequence, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, head = at < SIZE, at // (P * N)
    begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    grad = tl.zeros((BLOCK,), tl.float32)
    if HAS_FINAL:
        grad += tl.load(final + sequence * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    for step in range(end - begin):
        chunk = end - 1 - step
        start, length = tl.load(table + chunk), tl.load(table + Z + chunk)
        decay = tl.exp(tl.load(c + (start + length - 1) * H + head, mask=inside, other=0.0))
        there = tl.load(table + 2 * Z + chunk) != 0
        added = tl.load(states + chunk * SIZE + at, mask=inside & there, other=0.0)
        tl.store(states + chunk * SIZE + at, grad, mask=inside)
        grad = decay * grad + added
    if HAS_INITIAL:
        tl.store(initial + sequence * SIZE + at, grad, mask=inside)
