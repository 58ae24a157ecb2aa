"""The depth rule of the Nano 2 family: which layers go where nothing has been measured, from the pattern
alone.

It applies to patterns of Mamba-2, attention and MLP layers, and to no others. The family's rules stay (paper,
section 2.1): the first and the last layer, and an MLP behind each attention layer. From 62 to 56 layers the
paper removed 2 attention, 3 MLP and 1 Mamba-2 layers, that is, three mixers each with an MLP. Which ones can
be read off the two published patterns, and for the 12B these are taken. Beyond that, and for other models:

    1. a hybrid keeps 7 % of its layers as attention: those above go with their MLP, the outermost first;
    2. then a mixer with its MLP from the middle of the longest run between attention layers, which spreads
       attention evenly;
    3. an odd one out is an MLP that follows no attention, else a Mamba-2 layer.

Measured importance (`prune --layers N --calibration`) is better than this rule, which does not look at the
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from nanohybrid.errors import InputError
from nanohybrid.model.mixers import MIXERS, MLP, Attention, Mamba2
from nanohybrid.presets import PRESETS

KINDS = (Mamba2.symbol, Attention.symbol, MLP.symbol)
ATTENTION_SHARE = 0.07
KNOWN = {str(PRESETS["nano-12b-v2"]["pattern"]): str(PRESETS["nano-9b-v2"]["pattern"])}


def applies_to(pattern: str) -> bool:
    """Whether the rule knows all kinds of layers of a pattern."""
    return set(pattern) <= set(KINDS)


def layers_to_drop(pattern: str, layers: int) -> tuple[int, ...]:
    """The layers, ascending, without which `layers` of the pattern remain.

    Raises InputError where that is impossible, and for a pattern with other kinds of layers.
    """
    if not applies_to(pattern):
        other = next(kind for kind in pattern if kind not in KINDS)
        raise InputError(
            f"which layers go is not known: the depth rule has none for layers {other} "
            f"({MIXERS[other].label}); "
            "rank them by measured importance (prune --layers N --calibration), or name them (--drop-layers)"
        )
    if not 1 <= layers <= len(pattern):
        raise InputError(f"{layers} layers: the model has {len(pattern)}, possible are 1 to {len(pattern)}")
    known = KNOWN.get(pattern, "")
    gone = list(drops_to(pattern, known)) if known and layers <= len(known) else []
    while (left := [i for i in range(len(pattern)) if i not in gone])[layers:]:
        gone += _next(pattern, left, layers)
    return tuple(sorted(gone))


def drops_to(pattern: str, wanted: str) -> tuple[int, ...]:
    """The layers of `pattern` without which it reads `wanted`, each kept layer being the first that can
    be."""
    gone, place = [], 0
    for index, kind in enumerate(pattern):
        if place < len(wanted) and kind == wanted[place]:
            place += 1
        else:
            gone.append(index)
    if place < len(wanted):
        raise InputError(f"the pattern {wanted} cannot be had from {pattern} by removing layers")
    return tuple(gone)


def _next(pattern: str, left: Sequence[int], layers: int) -> list[int]:
    if len(left) - layers > 1:
        place = _pair([pattern[index] for index in left], layers)
        if place is not None:
            return [left[place], left[place + 1]]
    return [_single(pattern, left)]


def _pair(kinds: Sequence[str], layers: int) -> int | None:
    """The place of a mixer that goes with the MLP behind it, neither being the first or the last layer; None
    where there is none."""
    pairs = [
        place
        for place in range(1, len(kinds) - 2)
        if kinds[place] != MLP.symbol and kinds[place + 1] == MLP.symbol
    ]
    attention = [place for place in pairs if kinds[place] == Attention.symbol]
    hybrid = Mamba2.symbol in kinds
    if hybrid and attention and kinds.count(Attention.symbol) > ceil(ATTENTION_SHARE * layers):
        return max(attention, key=lambda place: abs(place - len(kinds) / 2))
    others = [place for place in pairs if kinds[place] == Mamba2.symbol] if hybrid else pairs
    if not others:
        return None
    edges = [
        -1,
        *(place for place, kind in enumerate(kinds) if kind == Attention.symbol and hybrid),
        len(kinds),
    ]
    runs = [[place for place in others if low < place < high] for low, high in pairwise(edges)]
    longest = max(runs, key=len)
    return _middle(longest, (longest[0] + longest[-1]) / 2)


def _single(pattern: str, left: Sequence[int]) -> int:
    inside = range(1, len(left) - 1)
    loose = [
        place
        for place in inside
        if pattern[left[place]] == MLP.symbol and pattern[left[place - 1]] != Attention.symbol
    ]
    mamba = [place for place in inside if pattern[left[place]] == Mamba2.symbol]
    mixers = [place for place in inside if pattern[left[place]] == Attention.symbol]
    return left[_middle(loose or mamba or mixers or list(inside) or [0], (len(left) - 1) / 2)]


def _middle(places: Sequence[int], center: float) -> int:
    return min(places, key=lambda place: abs(place - center))
