"""The output of each token of a chunk: from earlier tokens of the chunk and from its initial state."""

import triton
import triton.language as tl


@triton.jit
def bmm_chunk(
    B, C, out, starts_Z, lengths_Z, B_stride, C_stride, N, G,
    TYPE: tl.constexpr, Q: tl.constexpr, TOKENS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """out [Z, G, Q, Q] = C_i . B_j, in the tiles that hold any j <= i.

    The other tiles are neither written nor read.
    """
    i_tile, j_tile = tl.program_id(0) // (Q // TOKENS), tl.program_id(0) % (Q // TOKENS)
    group, chunk = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, length = tl.load(starts_Z + chunk), tl.load(lengths_Z + chunk)
    if (j_tile <= i_tile) & (i_tile * TOKENS < length):
        i, j, n = (
            i_tile * TOKENS + tl.arange(0, TOKENS),
            j_tile * TOKENS + tl.arange(0, TOKENS),
            tl.arange(0, STATE),
        )
        is_n = n < N
        C_tile = tl.load(
            C + (start + i)[:, None] * C_stride + group * N + n[None, :],
            mask=(i < length)[:, None] & is_n[None, :],
            other=0,
        )
        B_tile = tl.load(
            B + (start + j)[None, :] * B_stride + group * N + n[:, None],
            mask=(j < length)[None, :] & is_n[:, None],
            other=0,
        )
        tile = tl.dot(C_tile.to(TYPE), B_tile.to(TYPE), input_precision="ieee")
        tl.store(out + ((chunk * G + group) * Q + i)[:, None] * Q + j[None, :], tile)


@triton.jit
def chunk_scan(
    x, dt, c, C, D, states, scores, y, starts_Z, lengths_Z, x_stride, C_stride, H, P, N, G, TYPE:
    tl.constexpr, Q: tl.constexpr, TOKENS: tl.constexpr, STATE: tl.constexpr, FIRST: tl.constexpr, SECOND:
    tl.constexpr,
):  # fmt: skip
    """y of TOKENS tokens of one head. Its P columns are computed as FIRST and SECOND columns."""
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, chunk = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, length = tl.load(starts_Z + chunk), tl.load(lengths_Z + chunk)
    if tl.program_id(0) * TOKENS < length:
        group, is_i = head // (H // G), i < length
        c_i = tl.load(c + (start + i) * H + head, mask=is_i, other=0)
        # 1. from the state
        n, p = tl.arange(0, STATE), tl.arange(0, FIRST)
        C_tile = tl.load(
            C + (start + i)[:, None] * C_stride + group * N + n[None, :],
            mask=is_i[:, None] & (n < N)[None, :],
            other=0,
        )
        state = states + (chunk * H + head) * P * N
        total = _read_state(C_tile, state, p, n, P, N, TYPE) * tl.exp(c_i)[:, None]
        if SECOND > 0:
            p2 = FIRST + tl.arange(0, SECOND)
            total2 = _read_state(C_tile, state, p2, n, P, N, TYPE) * tl.exp(c_i)[:, None]
        # 2. from the earlier tokens and the token itself
        row = scores + ((chunk * G + group) * Q + i)[:, None] * Q
        x_head = x + head * P
        for first in range(0, tl.minimum(length, (tl.program_id(0) + 1) * TOKENS), TOKENS):
            j = first + tl.arange(0, TOKENS)
            at, is_j = (start + j) * H + head, j < length
            causal = (j[None, :] <= i[:, None]) & is_i[:, None]
            log_decay = c_i[:, None] - tl.load(c + at, mask=is_j, other=0)[None, :]
            weights = (
                tl.exp(tl.where(causal, log_decay, float("-inf")))
                * tl.load(dt + at, mask=is_j, other=0)[None, :]
            )
            weights = (weights * tl.load(row + j[None, :], mask=causal, other=0)).to(TYPE)
            x_row = x_head + (start + j)[:, None] * x_stride
            x_tile = tl.load(x_row + p[None, :], mask=is_j[:, None] & (p < P)[None, :], other=0).to(TYPE)
            total = tl.dot(weights, x_tile, total, input_precision="ieee")
            if SECOND > 0:
                x_tile2 = tl.load(x_row + p2[None, :], mask=is_j[:, None] & (p2 < P)[None, :], other=0).to(
                    TYPE
                )
                total2 = tl.dot(weights, x_tile2, total2, input_precision="ieee")
        # 3. the skip connection
        skip = tl.load(D + head)
        _store_with_skip(total, x_head, y + head * P, start + i, p, is_i, skip, x_stride, H, P)
        if SECOND > 0:
            _store_with_skip(total2, x_head, y + head * P, start + i, p2, is_i, skip, x_stride, H, P)


@triton.jit
def _read_state(C_tile, state, p, n, P, N, TYPE: tl.constexpr):
    """[TOKENS, p] = C S^T. The state is loaded transposed from memory."""
    S_tile = tl.load(state + p[None, :] * N + n[:, None], mask=(p < P)[None, :] & (n < N)[:, None], other=0)
    return tl.dot(C_tile.to(TYPE), S_tile.to(TYPE), input_precision="ieee")


@triton.jit
def _store_with_skip(total, x_head, y_head, token, p, is_i, skip, x_stride, H, P):
    """y = total + D x."""
    inside = is_i[:, None] & (p < P)[None, :]
    x_p = tl.load(x_head + token[:, None] * x_stride + p[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(y_head + token[:, None] * H * P + p[None, :], total + skip * x_p, mask=inside)
