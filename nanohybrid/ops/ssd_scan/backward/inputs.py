"""Kernels for the gradients of x, dt and A of one chunk.

    df_j = sum_{i >= j} exp(c_i - c_j) scores_ij dy_i + exp(c_Q - c_j) dS B_j
    dx_j = dt_j df_j + D dy_j                               f_j = dt_j x_j

c_k decays what passes from before token k to k or later, so its log has the gradient

    dlog_k = sum_{i >= k > j} (term ij of dy . y) + sum_{i >= k} r_i + sum_{j < k} e_j + exp(c_Q) S . dS
    r_i = exp(c_i) dy_i . (S C_i)        e_j = f_j . (exp(c_Q - c_j) dS B_j)

and ddt_k = x_k . df_k + A dlog_k, dA = sum_k dt_k dlog_k. The torch form computes dlog from two dot products,
a difference of large numbers that must cancel. With operands rounded to bf16 they would not cancel, so here
the terms that cross k are summed instead.

Z chunks · Q tokens of a chunk · H heads · P head dimension · G groups · N state size.
"""

import triton
import triton.language as tl


@triton.jit
def _add_states(
    df, x, dt_j, c_j, c_last, dy, B_QN, C_QN, D_h, entering, leaving, dx, token, inside, stride_x, head, H,
    has_entering, has_leaving, FROM: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_N: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Add the states' part to df of WIDTH channels and store dx.

    Returns the sums over these channels that the other gradients need: x . df, r, e, dy . x, S . dS.
    """
    p, n = FROM + tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    there = inside[:, None] & (p < P)[None, :]
    dy_QP = tl.load(dy + (token[:, None] * H + head) * P + p[None, :], mask=there, other=0.0).to(tl.float32)
    x_QP = tl.load(x + token[:, None] * stride_x + head * P + p[None, :], mask=there, other=0.0).to(
        tl.float32
    )
    state_at, in_state = p[None, :] * N + n[:, None], (p < P)[None, :] & (n < N)[:, None]
    entering_NP = tl.load(entering + state_at, mask=in_state & has_entering, other=0.0)
    leaving_NP = tl.load(leaving + state_at, mask=in_state & has_leaving, other=0.0)
    r, e = tl.zeros_like(dt_j), tl.zeros_like(dt_j)
    if has_entering:
        read = tl.dot(C_QN, entering_NP.to(OPERAND), input_precision="ieee")
        r = tl.exp(c_j) * tl.sum(dy_QP * read, 1)
    if has_leaving:
        left = tl.dot(B_QN, leaving_NP.to(OPERAND), input_precision="ieee") * tl.exp(c_last - c_j)[:, None]
        e = dt_j * tl.sum(left * x_QP, 1)
        df += left
    tl.store(
        dx + (token[:, None] * H + head) * P + p[None, :],
        (dy_QP * D_h + df * dt_j[:, None]).to(dx.dtype.element_ty),
        mask=there,
    )
    return tl.sum(df * x_QP, 1), r, e, tl.sum(dy_QP * x_QP), tl.sum(entering_NP * leaving_NP)


@triton.jit
def input_gradients(
    x, dt, c, B, C, D, dy, scores, entering, leaving, dx, x_df, r, e, dy_x, S_dS, table, stride_x, stride_B,
    stride_C, Z, H, G, P: tl.constexpr, N: tl.constexpr, OPERAND: tl.constexpr, CHUNK: tl.constexpr, BLOCK:
    tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx [T, H, P].

    x_df, r, e [T, H]: x . df, r and e. dy_x [Z, blocks, H]: dy . x, for D. S_dS [Z, H]: S . dS.
    """
    chunk, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(table + chunk), tl.load(table + Z + chunk)
    if block * BLOCK >= length:
        return
    has_entering, has_leaving = tl.load(table + 2 * Z + chunk) != 0, tl.load(table + 3 * Z + chunk) != 0
    group = head // (H // G)
    j, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    inside, token = j < length, start + j
    c_j = tl.load(c + token * H + head, mask=inside, other=0.0)
    dt_j = tl.load(dt + token * H + head, mask=inside, other=0.0)
    c_last = tl.load(c + (start + length - 1) * H + head)
    # 1. inside the chunk, over all later tokens i
    matrix = scores + (chunk.to(tl.int64) * G + group) * CHUNK * CHUNK
    df = tl.zeros((BLOCK, FIRST), tl.float32)
    if SECOND:
        df_tail = tl.zeros((BLOCK, SECOND), tl.float32)
    for first in range(block * BLOCK, length, BLOCK):
        i = first + tl.arange(0, BLOCK)
        c_i = tl.load(c + (start + i) * H + head, mask=i < length, other=0.0)
        causal = (i[None, :] >= j[:, None]) & (i < length)[None, :]
        decay = tl.exp(tl.where(causal, c_i[None, :] - c_j[:, None], float("-inf")))
        weights = (tl.load(matrix + i[None, :] * CHUNK + j[:, None]) * decay).to(OPERAND)
        p = tl.arange(0, FIRST)
        dy_at = dy + ((start + i)[:, None] * H + head) * P
        dy_QP = tl.load(dy_at + p[None, :], mask=(i < length)[:, None] & (p < P)[None, :], other=0.0)
        df = tl.dot(weights, dy_QP.to(OPERAND), df, input_precision="ieee")
        if SECOND:
            q = FIRST + tl.arange(0, SECOND)
            dy_QT = tl.load(dy_at + q[None, :], mask=(i < length)[:, None] & (q < P)[None, :], other=0.0)
            df_tail = tl.dot(weights, dy_QT.to(OPERAND), df_tail, input_precision="ieee")
    # 2. through both states, then store
    there = inside[:, None] & (n < N)[None, :]
    B_QN = tl.load(B + token[:, None] * stride_B + group * N + n[None, :], mask=there, other=0.0).to(OPERAND)
    C_QN = tl.load(C + token[:, None] * stride_C + group * N + n[None, :], mask=there, other=0.0).to(OPERAND)
    state = (chunk.to(tl.int64) * H + head) * P * N
    D_h = tl.load(D + head)
    x_df_sum, r_sum, e_sum, dy_x_sum, S_dS_sum = _add_states(
        df, x, dt_j, c_j, c_last, dy, B_QN, C_QN, D_h, entering + state, leaving + state, dx, token, inside,
        stride_x, head, H, has_entering, has_leaving, 0, FIRST, P, N, BLOCK_N, OPERAND,
    )  # fmt: skip
    if SECOND:
        more = _add_states(
            df_tail, x, dt_j, c_j, c_last, dy, B_QN, C_QN, D_h, entering + state, leaving + state, dx, token,
            inside, stride_x, head, H, has_entering, has_leaving, FIRST, SECOND, P, N, BLOCK_N, OPERAND,
        )  # fmt: skip
        x_df_sum, r_sum, e_sum, dy_x_sum, S_dS_sum = (
            x_df_sum + more[0],
            r_sum + more[1],
            e_sum + more[2],
            dy_x_sum + more[3],
            S_dS_sum + more[4],
        )
    at = token * H + head
    tl.store(x_df + at, x_df_sum, mask=inside)
    tl.store(r + at, r_sum, mask=inside)
    tl.store(e + at, e_sum, mask=inside)
    tl.store(dy_x + (chunk * (CHUNK // BLOCK) + block) * H + head, dy_x_sum)
    if block == 0:
        tl.store(S_dS + chunk * H + head, S_dS_sum)


@triton.jit
def decay_gradients(
    dt, A, c, by_row, by_column, x_df, r, e, S_dS, ddt, dA, table, T, Z, H,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """ddt [T, H], and dA [Z, H] of each chunk."""
    chunk = tl.program_id(0)
    start, length = tl.load(table + chunk), tl.load(table + Z + chunk)
    k, h = tl.arange(0, CHUNK), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (k < length)[:, None] & (h < H)[None, :]
    at = (start + k)[:, None] * H + h[None, :]
    later = tl.load(r + at, mask=inside, other=0.0)
    for block in tl.static_range(CHUNK // BLOCK):
        rows = inside & (k >= block * BLOCK)[:, None]
        columns = inside & (k < (block + 1) * BLOCK)[:, None] & (block * BLOCK < length)
        later += tl.load(by_row + block * T * H + at, mask=rows, other=0.0)
        later -= tl.load(by_column + block * T * H + at, mask=columns, other=0.0)
    left = tl.load(e + at, mask=inside, other=0.0)
    c_last = tl.load(c + (start + length - 1) * H + h, mask=h < H, other=0.0)
    across = tl.exp(c_last) * tl.load(S_dS + chunk * H + h, mask=h < H, other=0.0)
    dlog = tl.cumsum(later, 0, reverse=True) + (tl.cumsum(left, 0) - left) + across[None, :]
    dlog = tl.where(inside, dlog, 0.0)
    df = tl.load(x_df + at, mask=inside, other=0.0)
    tl.store(ddt + at, df + dlog * tl.load(A + h, mask=h < H, other=0.0)[None, :], mask=inside)
    tl.store(dA + chunk * H + h, tl.sum(dlog * tl.load(dt + at, mask=inside, other=0.0), 0), mask=h < H)
