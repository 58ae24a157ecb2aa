"""The structure of the package, read from its syntax trees: no import circle, and no list of kinds of layers
outside model/mixers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanohybrid"
SYMBOLS = {"M", "*", "-"}
CLASSES = {"Mamba2", "Attention", "MLP"}
KNOWS_KINDS = {
    "presets.py": "patterns are data there",
    "checkpoint/dense_config.py": "a layer of Llama's and Qwen3's is an attention and an MLP of ours",
    "checkpoint/llama_cpp.py": "llama.cpp's nemotron_h needs a Mamba-2 and an attention layer",
    "prune/depth_rule.py": "the paper's rule for the Nano 2 family",
}


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports anywhere: at its head, inside functions, and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (inner & known.keys()) or {node.module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_no_modules_import_each_other_in_a_circle():
    """At run time, inside functions, or for types."""
    known = modules()
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    graph.pop("nanohybrid")  # the public names, resolved when first used
    graph = {name: others - {"nanohybrid"} for name, others in graph.items()}
    assert circles(graph) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_module_imports_the_public_face():
    known = modules()
    assert [name for name, path in known.items() if "nanohybrid" in set(imports(path, known))] == []


def lists_of_kinds(source: str) -> list[int]:
    """The lines that list kinds of layers by hand, or ask whether a layer is of one."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict | ast.Tuple | ast.List | ast.Set):
            parts = node.keys if isinstance(node, ast.Dict) else node.elts
            symbols = {part.value for part in parts if isinstance(part, ast.Constant)} & SYMBOLS
            names = {part.id for part in parts if isinstance(part, ast.Name)} | {
                part.value.id
                for part in parts
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)
            }
            if ("M" in symbols and len(symbols) > 1) or len(names & CLASSES) > 1:
                lines.append(node.lineno)
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count"
        ):
            sides = [node.func.value, *node.args]
        symbol = any(isinstance(side, ast.Constant) and side.value in SYMBOLS for side in sides)
        about = any(word in ast.unparse(side) for side in sides for word in ("pattern", "kind", "layer"))
        if symbol and about:
            lines.append(node.lineno)
    return lines


def test_no_file_but_the_mixers_lists_kinds_of_layers():
    """A kind of layer is one file with its facts; everything else reads the registry."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if "mixers" not in path.parts and str(path.relative_to(PACKAGE)) not in KNOWS_KINDS
        for line in lists_of_kinds(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "COLORS = {'M': 1, '*': 2, '-': 3}",
        "if 'M' in config.pattern: pass",
        "n = config.pattern.count('*')",
        "if kind == '-': pass",
        "READERS = (Mamba2, MLP)",
        "at = {Mamba2.symbol: 1, MLP.symbol: 2}",
    ],
)
def test_a_list_of_kinds_is_found(source):
    assert lists_of_kinds(source) == [1]


@pytest.mark.parametrize(
    "source", ["if text == '-': pass", "operators = {'+', '-', '*'}", "unit = ('G', 'M')"]
)
def test_other_uses_of_the_characters_are_no_lists_of_kinds(source):
    assert lists_of_kinds(source) == []
