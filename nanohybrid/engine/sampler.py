"""From logits to tokens, for many rows with their own parameters at once.

A row's choice depends on its logits, its parameters and a uniform number that is a hash of (seed, position): there is
no generator with a state, so a request says the same alone, in a batch, or resumed. Per row, in transformers' order:

    penalties and bias -> temperature -> top-k -> top-p -> min-p -> the first token whose cumulative probability exceeds the uniform number

Equal logits are kept or cut together. Letters: S rows (sequences) · R those of them that are drawn · V vocabulary · C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanohybrid.engine.params import SamplingParams, Top
from nanohybrid.engine.penalties import Edits, Written

COLDEST = 1e-6  # a temperature above 0 but below this would overflow fp32; the choice is the same
CANDIDATES, WIDER = (
    64,
    16,
)  # top-p looks at the best 64 of a row first, and at 16 times as many where they do not suffice


@dataclass(frozen=True)
class Sampled:
    """One token a row, its log-probability and the likeliest ones where any row asked, and the rows that were not numbers."""

    tokens: list[int]
    logprobs: list[float] | None
    broken: list[int]
    top: Top | None = None


class Rows:
    """The parameters of a batch's rows as tensors: made once, used while the same requests decode together."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        written: Sequence[Written] | None = None,
    ) -> None:
        edited = any(p.penalized or p.bias for p in params)
        self.edits = Edits(params, written or [Written((), ())] * len(params), device) if edited else None
        self.top = max((p.top_logprobs for p in params), default=0)
        drawn = [row for row, p in enumerate(params) if p.temperature > 0]
        self.logprobs = any(p.logprobs for p in params)
        self.scaled = bool(drawn)
        self.all_drawn = len(drawn) == len(params)
        self.drawn_R = torch.tensor(drawn, dtype=torch.long, device=device)
        self.temperature_S = torch.tensor(
            [max(p.temperature, COLDEST) if p.temperature > 0 else 1.0 for p in params], device=device
        )
        self.seed_R = torch.tensor([_signed(seeds[row]) for row in drawn], dtype=torch.long, device=device)
        chosen = [params[row] for row in drawn]
        self.top_k = _Cut([float(p.top_k) for p in chosen], 0.0, device)
        self.top_p = _Cut([p.top_p for p in chosen], 1.0, device)
        self.min_p = _Cut([p.min_p for p in chosen], 0.0, device)


class _Cut:
    """The rows for which one of the three cuts is on, and its values there."""

    def __init__(self, values: list[float], off: float, device: torch.device | str) -> None:
        on = [row for row, value in enumerate(values) if value != off]
        self.rows = torch.tensor(on, dtype=torch.long, device=device)
        self.values_R1 = torch.tensor([values[row] for row in on], device=device)[:, None]
        self.most = int(max(values, default=0.0))
        self.some, self.all = bool(on), len(on) == len(values)


def sample(
    logits_SV: Tensor,
    rows: Rows,
    positions: Sequence[int],
    forced: Sequence[tuple[int, int]] = (),
    masks: Sequence[tuple[int, np.ndarray]] = (),
) -> Sampled:
    """Choose one token a row. `positions` are where the tokens will stand; `forced` holds (row, token) not to be sampled; `masks`
    (row, bool [V]): which tokens the row may have at all."""
    return draw(logits_SV, rows, positions, forced, masks).fetch()


def draw(
    logits_SV: Tensor,
    rows: Rows,
    positions: Sequence[int],
    forced: Sequence[tuple[int, int]] = (),
    masks: Sequence[tuple[int, np.ndarray]] = (),
) -> Drawn:
    """The same, left on the device: on a GPU nothing here waits for it."""
    if rows.edits is not None:
        logits_SV = rows.edits.apply(logits_SV)
    if masks:
        logits_SV = masked(logits_SV, masks)
    peak_S, token_S = _largest(logits_SV)
    scaled_SV = logits_SV
    if rows.scaled:
        if rows.logprobs or rows.all_drawn:
            scaled_SV = (logits_SV - peak_S[:, None]) / rows.temperature_S[:, None]
        if rows.all_drawn:
            token_S = _draw(scaled_SV, rows, positions)
        else:
            part = rows.drawn_R
            scaled_RV = (
                scaled_SV[part]
                if rows.logprobs
                else (logits_SV[part] - peak_S[part, None]) / rows.temperature_S[part, None]
            )
            token_S[part] = _draw(scaled_RV, rows, positions)
    if forced:
        at, ids = sent(forced, token_S.device).unbind(1)
        token_S[at] = ids
    results = [token_S, peak_S]
    if rows.logprobs:
        total_S1 = scaled_SV.logsumexp(dim=-1, keepdim=True)
        results.append((scaled_SV.gather(1, token_S[:, None]) - total_S1)[:, 0])
        if rows.top:
            best = scaled_SV.topk(min(rows.top, scaled_SV.shape[-1]), dim=-1)
            results += [best.indices, best.values - total_S1]
    return Drawn(token_S, results)


def masked(logits_SV: Tensor, masks: Sequence[tuple[int, np.ndarray]]) -> Tensor:
    """A copy of the logits with -inf where the mask of a row, bool [V], is false."""
    row_R = sent([row for row, _ in masks], logits_SV.device)
    allowed_RV = torch.from_numpy(np.stack([allowed_V for _, allowed_V in masks])).to(logits_SV.device)
    return logits_SV.index_put((row_R,), logits_SV[row_R].masked_fill(~allowed_RV, -math.inf))


def _largest(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row, and where it stands first; what is no number is larger than all that are.

    On a CPU by numpy: torch would wake its threads for a vocabulary, which takes longer than the search.
    """
    if logits_SV.device.type != "cpu":
        return torch.max(logits_SV, dim=-1)
    rows = logits_SV.numpy()
    tokens = rows.argmax(axis=-1)
    return torch.from_numpy(rows[np.arange(len(rows)), tokens]), torch.from_numpy(tokens)


class Drawn:
    """What was drawn, on its way to the host: `fetch` waits for that, and for nothing that the device was given afterwards."""

    def __init__(self, token_S: Tensor, results: list[Tensor]) -> None:
        self.token_S = token_S
        self._event: torch.cuda.Event | None = None
        if token_S.is_cuda:
            results = [
                torch.empty(r.shape, dtype=r.dtype, pin_memory=True).copy_(r, non_blocking=True)
                for r in results
            ]
            self._event = torch.cuda.Event()
            self._event.record()
        self._results = results

    def fetch(self) -> Sampled:
        if self._event is not None:
            self._event.synchronize()
        token_S, peak_S, *rest = self._results
        broken = [row for row, peak in enumerate(peak_S.tolist()) if not math.isfinite(peak)]
        top = None
        if len(rest) == 3:
            top = [
                list(zip(ids, values, strict=True))
                for ids, values in zip(rest[1].tolist(), rest[2].tolist(), strict=True)
            ]
        return Sampled(token_S.tolist(), rest[0].tolist() if rest else None, broken, top)


def sent(values: Sequence[object], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on the device, without waiting for what it is doing."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def uniform(seed_R: Tensor, position_R: Tensor) -> Tensor:
    """A float64 in [0, 1) with 48 random bits for each (seed, position): two rounds of splitmix64's finalizer."""
    word_R = _mix(_mix(seed_R + _GOLDEN) + position_R * _GOLDEN)
    return (word_R >> 16 & (1 << 48) - 1).double() / (1 << 48)


def keep_top_k(scaled_RV: Tensor, k_R1: Tensor, most: int) -> Tensor:
    """Cut all below the k-th largest of each row; `most` is the largest k."""
    values_RC = scaled_RV.topk(min(most, scaled_RV.shape[-1])).values
    kth_R1 = values_RC.gather(1, (k_R1.long() - 1).clamp(max=values_RC.shape[-1] - 1))
    return scaled_RV.masked_fill(scaled_RV < kth_R1, -math.inf)


def keep_top_p(scaled_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Keep, of each row, the fewest tokens whose probability reaches p."""
    probability_RV = scaled_RV.softmax(dim=-1)
    if probability_RV.is_cuda:
        least_R1 = least_by_bisection(probability_RV, p_R1)
    else:
        least_R1 = _least_of_top_p(probability_RV, p_R1, CANDIDATES)
    return scaled_RV.masked_fill(probability_RV < least_R1, -math.inf)


def keep_min_p(scaled_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Cut all that are less than p times as probable as the most probable."""
    return scaled_RV.masked_fill(scaled_RV < scaled_RV.amax(dim=-1, keepdim=True) + p_R1.log(), -math.inf)


def _least_of_top_p(probability_RV: Tensor, p_R1: Tensor, candidates: int) -> Tensor:
    candidates = min(candidates, probability_RV.shape[-1])
    best_RC = probability_RV.topk(candidates).values
    reached_RC = best_RC.cumsum(dim=-1)
    count_R1 = ((reached_RC - best_RC) < p_R1).sum(dim=-1, keepdim=True)
    least_R1 = best_RC.gather(1, (count_R1 - 1).clamp(min=0))
    short_R = (reached_RC[:, -1:] < p_R1)[:, 0]
    if candidates < probability_RV.shape[-1] and bool(short_R.any()):
        least_R1[short_R] = _least_of_top_p(probability_RV[short_R], p_R1[short_R], candidates * WIDER)
    return least_R1


def least_by_bisection(probability_RV: Tensor, p_R1: Tensor) -> Tensor:
    """The largest probability such that all tokens of at least it reach p together: 31 sums, and no look at how many it takes.

    Positive floats are ordered as their bits are, so halving an interval of bits ends at one float.
    """
    low_R1 = torch.zeros_like(p_R1, dtype=torch.int32)
    high_R1 = probability_RV.amax(dim=-1, keepdim=True).view(torch.int32) + 1
    for _ in range(31):
        middle_R1 = low_R1 + (high_R1 - low_R1) // 2
        mass_R1 = probability_RV.masked_fill(probability_RV < middle_R1.view(torch.float32), 0).sum(
            dim=-1, keepdim=True
        )
        reached_R1 = mass_R1 >= p_R1
        low_R1, high_R1 = (
            torch.where(reached_R1, middle_R1, low_R1),
            torch.where(reached_R1, high_R1, middle_R1),
        )
    return low_R1.view(torch.float32)


def _draw(scaled_RV: Tensor, rows: Rows, positions: Sequence[int]) -> Tensor:
    scaled_RV = _cut(scaled_RV, rows.top_k, lambda part, k: keep_top_k(part, k, rows.top_k.most))
    scaled_RV = _cut(scaled_RV, rows.top_p, keep_top_p)
    scaled_RV = _cut(scaled_RV, rows.min_p, keep_min_p)
    cumulative_RV = scaled_RV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    position_S = sent(positions, scaled_RV.device)
    wanted_R1 = uniform(rows.seed_R, position_S[rows.drawn_R])[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, wanted_R1, right=True)[:, 0].clamp(max=scaled_RV.shape[-1] - 1)


def _cut(scaled_RV: Tensor, cut: _Cut, keep: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if not cut.some:
        return scaled_RV
    if cut.all:
        return keep(scaled_RV, cut.values_R1)
    return scaled_RV.index_put((cut.rows,), keep(scaled_RV[cut.rows], cut.values_R1))


def _signed(seed: int) -> int:
    """Any integer as the int64 with the same low 64 bits."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix(word: Tensor) -> Tensor:
    """splitmix64's finalizer on int64, whose products wrap; `>>` is arithmetic there, so the sign bits are masked off."""
    word = (word ^ (word >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return word ^ (word >> 31 & (1 << 33) - 1)
