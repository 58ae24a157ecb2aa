"""The rows of the parts as markdown tables."""


def markdown(found: dict[str, dict]) -> str:
    """A section for each part: its title, its table, and its problem if there was one."""
    lines = []
    for part, content in found.items():
        lines += [f"## {part}", ""]
        if title := content.get("title"):
            lines += [title, ""]
        lines += table(content["rows"])
        if problem := content.get("problem"):
            lines += [f"Not complete: {problem}.", ""]
    return "\n".join(lines)


def table(rows: list[dict]) -> list[str]:
    """A table of rows with any keys; columns are in the order in which the keys first appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return []
    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|" + "---|" * len(keys)]
    return [*lines, *("| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows), ""]


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "" if value is None else str(value)
