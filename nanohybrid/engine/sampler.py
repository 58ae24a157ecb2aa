"""From logits to tokens, for many rows with their own parameters at once.

What a row samples depends on its logits, its parameters and a uniform number that is a hash of (seed,
position). There is no generator with a state, so a request samples the same tokens alone, in a batch, or
resumed. Per row, in the order of transformers:

    penalties and bias -> grammar mask -> temperature -> top-k -> top-p -> min-p
    -> the first token whose cumulative probability exceeds the uniform number

Equal logits are kept or removed together.

S rows (sequences) · R those of them that are sampled, not greedy · V vocabulary · C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanohybrid.engine.params import SamplingParams, Top
from nanohybrid.engine.penalties import LogitsProcessors, TokenHistory

MIN_TEMPERATURE = 1e-6  # a temperature between 0 and this would overflow fp32; the choice is the same
TOP_P_CANDIDATES = 64  # top-p sorts the most probable tokens of a row first,
TOP_P_GROWTH = 16  # and so many times as many where they do not reach p


@dataclass(frozen=True)
class Sampled:
    """One token for each row, and where any row asked its log-probability and the most probable tokens.

    non_finite: the rows whose logits had NaN or no finite value.
    """

    tokens: list[int]
    logprobs: list[float] | None
    non_finite: list[int]
    top: Top | None = None


class SamplingMetadata:
    """The sampling parameters of the rows of a batch, as tensors.

    Valid while the same requests decode together.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        history: Sequence[TokenHistory] | None = None,
    ) -> None:
        self.processors: LogitsProcessors | None = None
        if any(p.penalized or p.bias for p in params):
            history = history or [TokenHistory((), ())] * len(params)
            self.processors = LogitsProcessors(params, history, device)
        self.top = max((p.top_logprobs for p in params), default=0)
        self.logprobs = any(p.logprobs for p in params)
        sampled = [row for row, p in enumerate(params) if p.temperature > 0]
        self.any_sampled, self.all_sampled = bool(sampled), len(sampled) == len(params)
        self.sampled_R = torch.tensor(sampled, dtype=torch.long, device=device)
        temperatures = [max(p.temperature, MIN_TEMPERATURE) if p.temperature > 0 else 1.0 for p in params]
        self.temperature_S = torch.tensor(temperatures, device=device)
        self.seed_R = torch.tensor([_signed(seeds[row]) for row in sampled], dtype=torch.long, device=device)
        self.top_k = _Filter([float(params[row].top_k) for row in sampled], 0.0, device)
        self.top_p = _Filter([params[row].top_p for row in sampled], 1.0, device)
        self.min_p = _Filter([params[row].min_p for row in sampled], 0.0, device)


class _Filter:
    """The rows for which one of the three filters (top-k, top-p, min-p) is on, and its values there."""

    def __init__(self, values: list[float], off: float, device: torch.device | str) -> None:
        on = [row for row, value in enumerate(values) if value != off]
        self.rows = torch.tensor(on, dtype=torch.long, device=device)
        self.values_R1 = torch.tensor([values[row] for row in on], device=device)[:, None]
        self.largest = int(max(values, default=0.0))
        self.any, self.all = bool(on), len(on) == len(values)


def sample(
    logits_SV: Tensor,
    metadata: SamplingMetadata,
    positions: Sequence[int],
    forced: Sequence[tuple[int, int]] = (),
    masks: Sequence[tuple[int, np.ndarray]] = (),
) -> Sampled:
    """Sample one token for each row of logits [S, V].

    positions: of the tokens in their sequences. forced: (row, token) that is not sampled but given.
    masks: (row, bool [V]), the tokens that the row may have.
    """
    return sample_async(logits_SV, metadata, positions, forced, masks).fetch()


def sample_async(
    logits_SV: Tensor,
    metadata: SamplingMetadata,
    positions: Sequence[int],
    forced: Sequence[tuple[int, int]] = (),
    masks: Sequence[tuple[int, np.ndarray]] = (),
) -> SampleFuture:
    """The same as `sample`, but the result stays on the device: on a GPU nothing here waits for it."""
    if metadata.processors is not None:
        logits_SV = metadata.processors.apply(logits_SV)
    if masks:
        logits_SV = masked(logits_SV, masks)
    peak_S, token_S = _largest(logits_SV)
    scaled_SV = logits_SV
    if metadata.any_sampled:
        if metadata.logprobs or metadata.all_sampled:
            scaled_SV = (logits_SV - peak_S[:, None]) / metadata.temperature_S[:, None]
        if metadata.all_sampled:
            token_S = _sample_rows(scaled_SV, metadata, positions)
        else:
            part = metadata.sampled_R
            scaled_RV = (
                scaled_SV[part]
                if metadata.logprobs
                else (logits_SV[part] - peak_S[part, None]) / metadata.temperature_S[part, None]
            )
            token_S[part] = _sample_rows(scaled_RV, metadata, positions)
    if forced:
        at, ids = to_device(forced, token_S.device).unbind(1)
        token_S[at] = ids
    results = [token_S, peak_S]
    if metadata.logprobs:
        total_S1 = scaled_SV.logsumexp(dim=-1, keepdim=True)
        results.append((scaled_SV.gather(1, token_S[:, None]) - total_S1)[:, 0])
        if metadata.top:
            best = scaled_SV.topk(min(metadata.top, scaled_SV.shape[-1]), dim=-1)
            results += [best.indices, best.values - total_S1]
    return SampleFuture(token_S, results)


def masked(logits_SV: Tensor, masks: Sequence[tuple[int, np.ndarray]]) -> Tensor:
    """A copy of the logits with -inf where the mask of a row, bool [V], is false."""
    row_R = to_device([row for row, _ in masks], logits_SV.device)
    allowed_RV = torch.from_numpy(np.stack([allowed_V for _, allowed_V in masks])).to(logits_SV.device)
    return logits_SV.index_put((row_R,), logits_SV[row_R].masked_fill(~allowed_RV, -math.inf))


def _largest(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and its first position; a NaN is larger than all numbers.

    On a CPU by numpy: torch would wake its threads for one vocabulary, which takes longer than the search.
    """
    if logits_SV.device.type != "cpu":
        return torch.max(logits_SV, dim=-1)
    rows = logits_SV.numpy()
    tokens = rows.argmax(axis=-1)
    return torch.from_numpy(rows[np.arange(len(rows)), tokens]), torch.from_numpy(tokens)


class SampleFuture:
    """Sampled tokens on their way to the host.

    `fetch` waits for them, and for nothing that was queued on the device after them.
    """

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
        non_finite = [row for row, peak in enumerate(peak_S.tolist()) if not math.isfinite(peak)]
        top = None
        if len(rest) == 3:
            top = [
                list(zip(ids, values, strict=True))
                for ids, values in zip(rest[1].tolist(), rest[2].tolist(), strict=True)
            ]
        return Sampled(token_S.tolist(), rest[0].tolist() if rest else None, non_finite, top)


def to_device(values: Sequence[object], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on the device, without waiting for what it computes."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def uniform(seed_R: Tensor, position_R: Tensor) -> Tensor:
    """A float64 in [0, 1) with 48 random bits for each (seed, position).

    Two rounds of the finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014).
    """
    word_R = _mix(_mix(seed_R + _GOLDEN) + position_R * _GOLDEN)
    return (word_R >> 16 & (1 << 48) - 1).double() / (1 << 48)


def apply_top_k(scaled_RV: Tensor, k_R1: Tensor, largest: int) -> Tensor:
    """Remove (set to -inf) all tokens below the k-th largest of each row. largest: the largest k."""
    values_RC = scaled_RV.topk(min(largest, scaled_RV.shape[-1])).values
    kth_R1 = values_RC.gather(1, (k_R1.long() - 1).clamp(max=values_RC.shape[-1] - 1))
    return scaled_RV.masked_fill(scaled_RV < kth_R1, -math.inf)


def apply_top_p(scaled_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Keep the fewest most probable tokens of each row whose probabilities together reach p."""
    probability_RV = scaled_RV.softmax(dim=-1)
    if probability_RV.is_cuda:
        threshold_R1 = threshold_by_bisection(probability_RV, p_R1)
    else:
        threshold_R1 = _top_p_threshold(probability_RV, p_R1, TOP_P_CANDIDATES)
    return scaled_RV.masked_fill(probability_RV < threshold_R1, -math.inf)


def apply_min_p(scaled_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Remove tokens that are less than p times as probable as the most probable token."""
    return scaled_RV.masked_fill(scaled_RV < scaled_RV.amax(dim=-1, keepdim=True) + p_R1.log(), -math.inf)


def _top_p_threshold(probability_RV: Tensor, p_R1: Tensor, candidates: int) -> Tensor:
    candidates = min(candidates, probability_RV.shape[-1])
    best_RC = probability_RV.topk(candidates).values
    reached_RC = best_RC.cumsum(dim=-1)
    count_R1 = ((reached_RC - best_RC) < p_R1).sum(dim=-1, keepdim=True)
    threshold_R1 = best_RC.gather(1, (count_R1 - 1).clamp(min=0))
    short_R = (reached_RC[:, -1:] < p_R1)[:, 0]
    if candidates < probability_RV.shape[-1] and bool(short_R.any()):
        threshold_R1[short_R] = _top_p_threshold(
            probability_RV[short_R], p_R1[short_R], candidates * TOP_P_GROWTH
        )
    return threshold_R1


def threshold_by_bisection(probability_RV: Tensor, p_R1: Tensor) -> Tensor:
    """The largest probability such that the tokens that are at least as probable reach p together.

    Takes 31 sums, and no synchronization with the host. Positive floats have the order of their bits, so
    halving an interval of bits ends at one float.
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


def _sample_rows(scaled_RV: Tensor, metadata: SamplingMetadata, positions: Sequence[int]) -> Tensor:
    top_k, top_p, min_p = metadata.top_k, metadata.top_p, metadata.min_p
    scaled_RV = _filtered(scaled_RV, top_k, lambda part, k: apply_top_k(part, k, top_k.largest))
    scaled_RV = _filtered(scaled_RV, top_p, apply_top_p)
    scaled_RV = _filtered(scaled_RV, min_p, apply_min_p)
    cumulative_RV = scaled_RV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    position_R = to_device(positions, scaled_RV.device)[metadata.sampled_R]
    wanted_R1 = uniform(metadata.seed_R, position_R)[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, wanted_R1, right=True)[:, 0].clamp(max=scaled_RV.shape[-1] - 1)


def _filtered(scaled_RV: Tensor, filter: _Filter, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if not filter.any:
        return scaled_RV
    if filter.all:
        return apply(scaled_RV, filter.values_R1)
    return scaled_RV.index_put((filter.rows,), apply(scaled_RV[filter.rows], filter.values_R1))


def _signed(seed: int) -> int:
    """The int64 with the same low 64 bits as an integer of any size."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix(word: Tensor) -> Tensor:
    """splitmix64's finalizer on int64. Products wrap; `>>` is arithmetic, so the sign bits are masked off."""
    word = (word ^ (word >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return word ^ (word >> 31 & (1 << 33) - 1)
