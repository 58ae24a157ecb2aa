"""Rendering a chat template that came with a checkpoint, and therefore from a stranger, without trusting it.

jinja2's immutable sandbox keeps a template from reaching Python's insides. It does not keep it from running for ever or eating all
memory, so every render here has a budget of time and of work, in the thread that called, and everything that can make work pays
before it is done: each step of a loop, each call and filter, each new list, each string that is joined, repeated or padded. What a
template needs for chat is there (the filters, functions and extensions that transformers offers too); what only helps to spend is not.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from nanohybrid.errors import InputError

TEMPLATE_CHARACTERS = 262_144
SECONDS = 5.0
WORK = 16_000_000
WORK_PER_INPUT_CHARACTER = 64
LARGEST_ARGUMENT = 100_000
INTEGER_BITS = 4_096

_FILTERS = (
    "abs attr batch capitalize center count d default dictsort e escape first float forceescape groupby int items last length list lower map "
    "max min reject rejectattr reverse round safe select selectattr slice sort title trim truncate unique upper urlencode wordcount"
).split()
_REFUSED_ATTRIBUTES = {"expandtabs", "translate", "maketrans", "format_map", "encode", "to_bytes"}


class TemplateRefused(Exception):  # noqa: N818  it is a verdict: the template raised it on purpose
    """The template itself says that the messages are not for it (`raise_exception`)."""


class Budget:
    """What one render may still spend."""

    def __init__(self, work: int, seconds: float) -> None:
        self.work = work
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def pay(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0:
            raise SecurityError("it makes too much: more loop steps, list entries or characters than any chat needs")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it ran longer than {self.seconds:g} seconds")


_budget: ContextVar[Budget] = ContextVar("budget of the render in this thread")


def _pay(amount: int) -> None:
    _budget.get().pay(amount)


def _leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested lists and dictionaries, one by one; an entry that occurs twice comes twice."""
    stack = [value]
    while stack:
        top = stack.pop()
        yield top
        if isinstance(top, Mapping):
            stack.extend(top.keys())
            stack.extend(top.values())
        elif isinstance(top, (list, tuple, set, frozenset)):
            stack.extend(top)


def _pay_as_text(value: Any) -> None:
    """Pay for all the characters that writing `value` out makes."""
    if isinstance(value, str):
        _pay(len(value) + 1)
        return
    for leaf in _leaves(value):
        _pay(len(leaf) + 1 if isinstance(leaf, str) else 1)


def _made(value: Any) -> Any:
    """Pay for a value that an operation made: its characters if it is a text, its entries if it holds others."""
    if isinstance(value, str):
        _pay(len(value) + 1)
    else:
        for _ in _leaves(value):
            _pay(1)
    return value


def _steps(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _pay(1)
        yield value


def _check_arguments(arguments: Iterable[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, (int, float)) and abs(argument) > LARGEST_ARGUMENT:
            raise SecurityError(f"it passes a number above {LARGEST_ARGUMENT:,}")


# Operations that can make much out of little, each paying first.


def _replace(value: str, old: str, new: str, count: int = -1) -> str:
    value, old, new = str(value), str(old), str(new)
    _pay(len(value) + value.count(old) * len(new))
    return value.replace(old, new, -1 if count is None else count)


def _join(values: Iterable[Any], between: str = "", attribute: str | int | None = None) -> str:
    entries = list(_steps(values))
    if attribute is not None:
        entries = [entry[attribute] for entry in entries]
    for entry in entries:
        _pay_as_text(entry)
    _pay(len(str(between)) * len(entries))
    return str(between).join(map(str, entries))


def _join_by_method(between: str, values: Iterable[Any]) -> str:
    return _join(values, between)


def _pay_for_format(pattern: str, arguments: Iterable[Any]) -> None:
    if re.search(r"\d{5,}|\*|\{[^}]*\{", pattern):
        raise SecurityError("it pads a text by a width that is too large or computed")
    fields = pattern.count("%") + pattern.count("{")
    values = list(arguments)
    for value in values * min(fields, WORK):
        _pay_as_text(value)
    _pay(len(pattern) + fields * 10_000 if re.search(r"\d{3,}", pattern) else len(pattern))


def _format(value: str, *arguments: Any, **named: Any) -> str:
    _pay_for_format(str(value), [*arguments, *named.values()])
    return str(value) % (named or arguments)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * width
    lines = (str(value) + ("\n" if blank else "")).splitlines(keepends=True)
    _pay(len(str(value)) + len(lines) * (len(margin) + 1))
    return "".join(line if (not first and index == 0) or not (blank or line.strip()) else margin + line for index, line in enumerate(lines))


def _string(value: Any) -> str:
    _pay_as_text(value)
    return str(value)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError("it indents JSON by more than 16")
    _pay_as_text(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _concatenate(values: Sequence[Any]) -> str:
    return _join(values)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefused(message)


def _now(pattern: str) -> str:
    _pay_for_format(pattern, ())
    return datetime.datetime.now().strftime(pattern)  # noqa: DTZ005  the user's own clock is meant


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"  # jinja's shows all it holds, however much that is


def _paid(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def paid(*arguments: Any, **named: Any) -> Any:
        _check_arguments((*arguments, *named.values()))
        return _made(function(*arguments, **named))

    return paid


class _PayByStep(NodeTransformer):
    """Puts the toll into the syntax tree, where jinja2 has no hook: loops, literals and `~`."""

    def _through(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802  jinja2's naming
        self.generic_visit(node)
        node.iter = self._through(node.iter, "_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno), "_concatenate")

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return self._through(node, "_made")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return self._through(node, "_made") if node.ctx == "load" else node


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark what a model says; for rendering it is nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:  # noqa: ARG001  with a context, jinja2 computes nothing at compile time
    _pay_as_text(value)
    return value


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            finalize=_finalize,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        given: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        ours = {"replace": _replace, "join": _join, "format": _format, "indent": _indent, "string": _string, "tojson": _to_json}
        self.filters = {name: _paid(function) for name, function in {**given, **ours}.items()}
        self.filters |= {"_steps": _steps, "_made": _made, "_concatenate": _concatenate}
        self.globals = {
            **{name: self.globals[name] for name in ("range", "dict", "cycler", "joiner")},
            **{"namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _now},
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]  # jinja2 declares a bare attribute
        kept = []
        for part in parts:
            _pay(len(part) + 1)
            kept.append(part)
        return "".join(kept)

    def _generate(self, source: nodes.Template, *arguments: Any, **named: Any) -> str:
        _PayByStep().visit(source)
        source.set_environment(self)
        return super()._generate(source, *arguments, **named)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _REFUSED_ATTRIBUTES and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        _check_arguments((*arguments, *named.values()))
        _pay(1)
        if isinstance(function, LoopContext):  # a recursive loop goes down: its steps pay like any others
            arguments = (_steps(arguments[0]), *arguments[1:])
        owner, name = getattr(getattr(function, "__wrapped__", function), "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            return {"replace": _replace, "join": _join_by_method}[name](owner, *arguments, **named)
        if isinstance(owner, str) and name == "format":
            _pay_for_format(owner, [*arguments, *named.values()])
        return _made(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _pay_for_format(left, right if isinstance(right, tuple) else [right])
        elif operator in ("*", "**"):
            _pay_for_product(operator, left, right)
        return _made(super().call_binop(context, operator, left, right))


def _pay_for_product(operator: str, left: Any, right: Any) -> None:
    for value, other in ((left, right), (right, left)):
        if not isinstance(value, (int, float)) and isinstance(other, int):
            _check_arguments([other])
            _pay((len(value) if isinstance(value, str) else sum(1 for _ in _leaves(value))) * max(other, 0))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > INTEGER_BITS:
            raise SecurityError(f"it computes a number of more than {INTEGER_BITS} bits")


class Sandbox:
    """One template, compiled; `name` stands for it in messages."""

    def __init__(self, source: str, name: str, seconds: float = SECONDS) -> None:
        if len(source) > TEMPLATE_CHARACTERS:
            raise InputError(f"{name}: a chat template of {len(source):,} characters; the limit is {TEMPLATE_CHARACTERS:,}")
        self.name = name
        self._seconds = seconds
        environment = _Environment()
        try:
            self.inputs = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            self._template = environment.from_string(source)
        except Exception as error:  # noqa: BLE001  a stranger's file: whatever its compilation raises, it cannot be used
            raise InputError(f"{name}: the chat template does not compile: {_line(error)}") from None

    def render(self, **values: Any) -> str:
        """The text for these values, or an InputError that says what the template did."""
        size = sum(len(leaf) if isinstance(leaf, str) else 1 for leaf in _leaves(values))
        token = _budget.set(Budget(WORK + WORK_PER_INPUT_CHARACTER * size, self._seconds))
        try:
            return self._template.render(**values)
        except TemplateRefused as error:
            raise InputError(f"{self.name}: the chat template refuses these messages: {_line(error)}") from None
        except Exception as error:  # noqa: BLE001  as above
            raise InputError(f"{self.name}: the chat template was stopped: {_line(error)}") from None
        finally:
            _budget.reset(token)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__
