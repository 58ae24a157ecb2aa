"""Words that must not come back, in identifiers, docstrings, comments, strings (so in help and errors too)
and documents.

The field has a term for each of them. `allowed_words.toml` lists what is not cleaned yet: a path (a file, or
a directory with all that lies in it) and the words that may occur there. The list may only shrink: the test
fails for an entry that is no longer needed. `python tests/ground/test_language.py` removes such entries.
"""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = Path(__file__).with_name("allowed_words.toml")

# What a pattern matches -> the field's term. Matched in prose, as whole words, in any case.
PROSE = {
    r"(?:control|begin|start|end|stop|tool|special|thinking) marks?": "special token, BOS, EOS, `</think>`",
    r"rooms?": "memory, space, package",
    r"floors?": "layer (of packages)",
    r"houses?": "codebase",
    r"upstairs|downstairs": "upward import",
    r"prov(?:e|es|ed|en|ing)": "check, test, verify",
    r"proofs?": "check",
    r"pretend(?:s|ed|ing)?": "mock",
    r"put(?:s|ting)? aside": "preempt",
    r"whoever|nobody|somebody": "the caller, the user, no request",
    r"as it comes": "by default",
    r"mend(?:s|ed|ing)?": "fix",
    r"headlines?": "comparison, summary",
    r"hygiene": "sanitizer",
    r"tickets?": "request stream, handle",
    r"junctions?": "cache breakpoint",
    r"likeliest": "top-1, most probable",
    r"lately": "recent, exponential moving average",
    r"twins?": "matched baseline",
    r"forgetful": "memoryless",
    r"strangers?": "untrusted input",
    r"(?:quant|initial|normal|serial|optim|general|special|token|organ|minim|maxim)is"
    r"(?:e|es|ed|ing|ation|ations|er|ers)": "-ize",
    r"colour\w*|behaviour\w*|neighbour\w*|favour\w*|honour\w*": "-or",
    r"learnt|licen[c]ed?|centred?|centerd|artefacts?|catalogues?": "American spelling",
}
# Words in identifiers, which are split at underscores and capitals.
NAMES = {
    r"marks?": "special token, tag, tick",
    r"kept": "saved, selected, retained",
    r"rooms?": "memory, workspace, package",
    r"houses?|upstairs": "codebase",
    r"prov(?:e|es|ed|en)|proofs?": "check",
    r"pretend(?:s|ed)?": "mock",
    r"nobody|whoever|somebody": "caller, user",
    r"mend(?:s|ed|ing)?": "fix",
    r"headlines?": "comparison, summary",
    r"hygiene": "sanitizer",
    r"tickets?": "stream, handle",
    r"junctions?": "breakpoint",
    r"likeliest": "top",
    r"lately": "ema",
    r"twins?": "baseline",
    r"forgetful": "memoryless",
    r"(?:quant|initial|normal|serial|optim|general)is(?:e|es|ed|ing|ation|er)": "-ize",
    r"colours?|behaviours?|neighbours?|learnt|licence|centred?|centerd": "American spelling",
}
OF_PYTEST = {"mark", "marks"}  # also a word of pytest, so it may stand in names where pytest is used
NOT_FLOORS = re.compile(r"noise floors?|floor of \w+", re.IGNORECASE)
SKIPPED = {"tests/ground/test_language.py"}


def files() -> list[Path]:
    """The Python files of the project, its documents, and the newest section of the changelog."""
    folders = [ROOT / name for name in ("nanohybrid", "tests", "benchmarks", "examples")]
    python = [file for folder in folders for file in folder.rglob("*.py")] + [ROOT / "run.py"]
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [file for file in sorted(python + documents) if file.relative_to(ROOT).as_posix() not in SKIPPED]


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that is defined or used, with its line."""
    for node in ast.walk(tree):
        names: list[str | None] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.arg | ast.keyword):
            names = [node.arg]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.alias):
            names = [*node.name.split("."), node.asname]
        for name in names:
            if name:
                yield getattr(node, "lineno", 0), name


def words_of(identifier: str) -> list[str]:
    """`_HybridCache2` as `hybrid`, `cache`."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def prose_of(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string (docstrings, errors and help among them) and every comment, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def newest_section(changelog: str) -> str:
    """A changelog up to its second `## ` heading, without the list of old names under `### Renamed`."""
    return "\n## ".join(changelog.split("\n## ")[:2]).partition("\n### Renamed\n")[0]


def found_in(file: Path) -> dict[str, list[int]]:
    """The unwanted words of a file, in lower case, each with its lines."""
    source, result = file.read_text(encoding="utf-8"), dict[str, list[int]]()
    text: list[tuple[int, str]]
    if file.suffix == ".md":
        source = newest_section(source) if file.name == "CHANGELOG.md" else source
        text = list(enumerate(source.splitlines(), 1))
    else:
        tree = ast.parse(source)
        text = list(prose_of(source, tree))
        exempt = OF_PYTEST if "pytest" in source else set()
        for line, identifier in identifiers(tree):
            for word in words_of(identifier):
                if word not in exempt and re.fullmatch("|".join(NAMES), word):
                    result.setdefault(word, []).append(line)
    for line, part in text:
        for match in re.findall(PATTERN, NOT_FLOORS.sub("", part)):
            result.setdefault(" ".join(match.lower().split()), []).append(line)
    return result


PATTERN = re.compile(rf"(?<![\w-])(?:{'|'.join(PROSE)})(?!\w)", re.IGNORECASE)


@cache
def everything() -> dict[str, dict[str, list[int]]]:
    """Path below the root -> unwanted word -> lines."""
    return {file.relative_to(ROOT).as_posix(): found_in(file) for file in files()}


def allowed() -> dict[str, set[str]]:
    return {path: set(words) for path, words in tomllib.loads(ALLOWED.read_text()).items()}


def covers(entry: str, path: str) -> bool:
    return path == entry or path.startswith(f"{entry}/")


def needed() -> dict[str, set[str]]:
    """The entries of the list, each with those of its words that still occur."""
    return {
        entry: {
            word
            for word in words
            for path, found in everything().items()
            if covers(entry, path) and word in found
        }
        for entry, words in allowed().items()
    }


def term_for(word: str) -> str:
    return next(term for pattern, term in (PROSE | NAMES).items() if re.fullmatch(pattern, word))


@pytest.mark.parametrize("package", ["nanohybrid", "tests", "benchmarks", "examples", "docs", ""])
def test_unwanted_words_occur_only_where_they_are_allowed(package):
    permitted = allowed()
    wrong = [
        f"{path}:{lines[0]}: {word!r}; the field says: {term_for(word)}"
        for path, found in everything().items()
        if (path.startswith(f"{package}/") if package else "/" not in path)
        for word, lines in found.items()
        if not any(covers(entry, path) and word in words for entry, words in permitted.items())
    ]
    assert wrong == []


def test_every_allowed_word_still_occurs():
    """An entry that is not needed would let its word come back."""
    assert allowed() == needed(), "run `python tests/ground/test_language.py` and commit the shorter list"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def check_room(): ...", {"room"}),
        ("class Ticket: ...", {"ticket"}),
        ("x.kept_layers = 1", {"kept"}),
        ("f(marks=1, end_marks=2)", {"marks"}),
        ("import pytest\n@pytest.mark.slow\ndef f(): ...", set()),
        ('"""Proved on a pretended GPU."""', {"proved", "pretended"}),
        ("# what is put aside is kept", {"put aside"}),
        ("raise ValueError(f'{x}: has no room')", {"room"}),
        ("improved = approve = 'improved room-temperature'", {"room"}),
        ("learned, color, quantize = 1, 2, 3", set()),
    ],
)
def test_unwanted_words_are_found_in_names_strings_and_comments(tmp_path, source, words):
    file = tmp_path / "file.py"
    file.write_text(source)
    assert set(found_in(file)) == words


def test_unwanted_words_are_found_in_the_newest_section_of_the_changelog_only(tmp_path):
    file = tmp_path / "CHANGELOG.md"
    file.write_text("# Changes\n\n## Next\n\nThe house.\n\n### Renamed\n\n`proofs`\n\n## 0.1\n\nNobody.\n")
    assert set(found_in(file)) == {"house"}


def write_shorter_list() -> None:
    lines = [
        f'"{path}" = {sorted(words)}'.replace("'", '"') for path, words in sorted(needed().items()) if words
    ]
    ALLOWED.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_shorter_list()
