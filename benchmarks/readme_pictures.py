"""Draws the README's picture from a quickstart's results.

python benchmarks/readme_pictures.py runs/quickstart docs/pictures
"""

import json
import sys
from pathlib import Path

from nanohybrid.stages.plots import COLORS, STYLE
from nanohybrid.stages.report import INK

SHOWN = {"parent": "original", "pruned": "pruned", "distilled": "distilled", "transformer": "Transformer"}
GRAY = "#7d8590"  # reads on the light and the dark pages of a code host


def main(run: Path, out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    summary = json.loads((run / "summary.json").read_text())
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": "readme"}):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        bars, curve, decode = figure.subplots(1, 3)
        for index, (mode, label) in enumerate(
            {"thinking": "thinking", "no_thinking": "not thinking"}.items()
        ):
            heights = [summary["accuracy"][name][mode] for name in SHOWN]
            places = [place + (index - 0.5) * 0.4 for place in range(len(SHOWN))]
            bars.bar(places, heights, 0.38, color=COLORS[index], label=label)
        bars.set_xticks(range(len(SHOWN)), list(SHOWN.values()), fontsize=8)
        bars.set_title("held-out problems solved")
        bars.set_ylim(0, 1.25)
        bars.legend(fontsize=8, ncols=2, loc="upper center")
        bars.grid(axis="x", visible=False)
        curve.plot(*zip(*summary["budget_curve"], strict=True), color=COLORS[0], marker="o")
        curve.set_title("accuracy against thinking budget")
        curve.set_xlabel("thinking tokens")
        for color, (name, points) in zip(COLORS, summary["decode_ms"].items(), strict=False):
            decode.plot(*zip(*points, strict=True), color=color, marker="o", label=name)
        decode.set(xscale="log", xlabel="context, tokens")
        decode.set_title("milliseconds per decode step")
        decode.legend(fontsize=8)
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / "quickstart.svg", transparent=True, metadata={"Date": None})
    path = out / "quickstart.svg"
    path.write_text(path.read_text().replace(INK, GRAY))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
