"""Report of `bench serve`: percentiles, rates and errors of each level, and a plot of the times."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanohybrid.bench.serve_load import Point
from nanohybrid.stages import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = (50, 90, 99)


def summary(point: Point) -> dict[str, Any]:
    """Figures of one level.

    Times in seconds; throughput over the time from the first request to the last output.
    """
    good = [seen for seen in point.seen if seen.error is None]
    seconds = max(point.ended - point.began, 1e-9)
    written = sum(seen.tokens for seen in good)
    return {
        "rate": point.rate,
        "clients": point.clients,
        "seconds": seconds,
        "requests": len(point.seen),
        "completed": len(good),
        "errors": dict(Counter(seen.error for seen in point.seen if seen.error is not None)),
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": written / seconds,
        "prompt_tokens_per_second": sum(seen.prompt_tokens for seen in good) / seconds,
        "ttft": _spread([seen.first - seen.sent for seen in good if seen.first is not None]),
        "tpot": _spread([seen.per_token for seen in good if seen.per_token is not None]),
        "latency": _spread([seen.last - seen.sent for seen in good if seen.last is not None]),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile of a sorted, non-empty sequence, with linear interpolation."""
    place = (len(values) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def picture(levels: Sequence[dict[str, Any]], title: str) -> "Figure":
    """Plot TTFT and TPOT percentiles, in milliseconds, against the offered load."""
    by_rate = any(level["rate"] is not None for level in levels)
    kind, label = ("rate", "requests a second, offered") if by_rate else ("clients", "requests at once")
    series = {
        f"{name} p{percent}": [
            (level[kind], level[key][f"p{percent}"] * 1000) for level in levels if level[kind] and level[key]
        ]
        for name, key in (("first token", "ttft"), ("each token", "tpot"))
        for percent in PERCENTILES
    }
    return plots.lines(series, label, "milliseconds", title, log_y=True)


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES} if ordered else {}
