"""Reports: self-contained HTML pages for screens of all sizes, for printing, and for light and dark mode.

A page has no external references: styles are inline, and figures are inline SVG. The ink and grid colors of
the figures are replaced by those of the page, so figures follow the light or dark mode.
"""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from nanohybrid.extras import require
from nanohybrid.files import atomic_write
from nanohybrid.stages.recipe import to_toml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = (
    "#1f2328",
    "#d0d4da",
)  # colors of axes and grid in plots.py, replaced here by the colors of the page

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2328; --paper: #ffffff; --soft: #59636e; --grid: #d8dce2; --wash: #f5f6f8; --accent: #1a6fc9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --paper: #14171b; --soft: #9aa3ad; --grid: #333a42; --wash: #1c2026; --accent: #6cb2ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 48rem; padding: 1.2rem 1rem 4rem;
  color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--grid); }
p { margin: .6rem 0; }
code, pre { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--wash); border-radius: 4px; }
code { padding: .1em .3em; }
pre { padding: .8rem 1rem; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; }
figure { margin: 1.2rem 0; }
figure svg { width: 100%; height: auto; display: block; color: var(--ink); }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""


class Report:
    """A page, written from top to bottom. Every method returns the report, so calls can be chained."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def section(self, heading: str) -> Self:
        """Start a section."""
        self.parts.append(f"<h2>{markup(heading)}</h2>")
        return self

    def text(self, paragraph: str) -> Self:
        """Add paragraphs, separated by empty lines; `code` and **bold** are formatted, everything else is
        plain text."""
        self.parts += [f"<p>{markup(part)}</p>" for part in re.split(r"\n\s*\n", paragraph.strip())]
        return self

    def code(self, text: str) -> Self:
        """Add a block of preformatted text."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")
        return self

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> Self:
        """Add a table; columns of numbers are aligned to the right."""
        cells = [list(row) for row in rows]
        kinds = [
            ' class="number"' if cells and all(is_number(row[i]) for row in cells) else ""
            for i in range(len(headers))
        ]
        head = "".join(
            f"<th{kind}>{markup(header)}</th>" for header, kind in zip(headers, kinds, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{kind}>{markup(format_value(value))}</td>"
                for value, kind in zip(row, kinds, strict=True)
            )
            + "</tr>\n"
            for row in cells
        )
        self.parts.append(f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>')
        return self

    def figure(self, figure: "Figure", caption: str) -> Self:
        """Add a matplotlib figure, as inline SVG."""
        self.parts.append(
            f"<figure>{inline_svg(figure, caption)}<figcaption>{markup(caption)}</figcaption></figure>"
        )
        return self

    def html(self) -> str:
        """The page as HTML."""
        title = html.escape(self.title)
        head = (
            '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>"
        )
        body = "\n".join([f"<h1>{markup(self.title)}</h1>", *self.parts])
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
        )

    def write(self, path: Path) -> Path:
        """Write the page to `path`, which is returned."""
        atomic_write(path, self.html())
        return path


def stage_report(record: Mapping[str, Any], series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Report:
    """The default report of a stage: its results, the last row of each log, its inputs and its recipe."""
    made = record["made_with"]
    report = Report(f"nanohybrid {record['stage']}")
    report.text(
        f"{record['seconds']:,.0f} s, {record['tokens']:,} tokens, peak memory "
        f"{record['peak_memory_bytes'] / 2**30:.2f} GiB, on "
        f"{machine(made)}, nanohybrid {made['version']}."
    )
    if record["measures"]:
        report.section("Results").table(["result", "value"], record["measures"].items())
    for name, rows in series.items():
        if rows:
            report.section(name).text(f"Last of {len(rows):,} rows:").table(
                ["column", "value"], rows[-1].items()
            )
    if record["inputs"]:
        report.section("Inputs").table(
            ["input", "SHA-256"], [(key, f"`{value[:16]}`") for key, value in record["inputs"].items()]
        )
    return report.section("Recipe").code(to_toml(record["recipe"]))


def machine(made: Mapping[str, Any]) -> str:
    """A description of the machine in `made_with` of a lineage."""
    gpu = "" if made.get("device", "cpu") == "cpu" else f" and {made['device']}"
    return f"{made['cores']} cores{gpu} ({made['system']}, torch {made['torch']})"


def inline_svg(figure: "Figure", caption: str) -> str:
    """A figure as an SVG element in the colors of the page, without prolog, metadata and references."""
    matplotlib = require("matplotlib", "train")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(
        r'(<svg[^>]*?)\swidth="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1),
        count=1,
    )
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1).strip()


def markup(text: str) -> str:
    """Escaped text, with `code` and **bold** as HTML."""
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)


def format_value(value: Any) -> str:
    """A value as text: thousands separators, floats with four significant digits, large ones as integers."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:,.4g}"
    return str(value)


def is_number(value: Any) -> bool:
    """Whether a table cell is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
