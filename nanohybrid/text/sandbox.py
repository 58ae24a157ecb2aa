"""Rendering a chat template that came with a checkpoint, and therefore from a stranger, without trusting it.

jinja2's immutable sandbox keeps a template from reaching Python's insides. It does not keep it from running for ever or eating all
memory, so every render here has a budget of time and of work, in the thread that called, and everything that can make work pays
before it is done: each step of a loop, each call and filter, each new list, each string that is joined, repeated or padded. What a
template needs for chat is there (the filters, functions and extensions that transformers offers too); what only helps to spend is not.
"""

import datetime
import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from nanohybrid.errors import InputError
from nanohybrid.text import budget

TEMPLATE_CHARACTERS = 262_144
SECONDS = 5.0
WORK = 16_000_000
WORK_PER_INPUT_CHARACTER = 64

_FILTERS = (
    *(
        "abs",
        "attr",
        "batch",
        "capitalize",
        "center",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
    ),
    *(
        "forceescape",
        "groupby",
        "int",
        "items",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
    ),
    *(
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "slice",
        "sort",
        "title",
        "trim",
        "truncate",
        "unique",
        "upper",
    ),
    *("urlencode", "wordcount"),
)
_JINJA_PASSES = {"_loop_vars", "_block_vars"}  # into every call, for functions that take the context
_REFUSED_ATTRIBUTES = {"expandtabs", "translate", "maketrans", "encode", "to_bytes"}


class TemplateRefused(Exception):
    """The template itself says that the messages are not for it (`raise_exception`)."""


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefused(message)


def _now(pattern: str) -> str:
    budget.pay_for_format(pattern, ())
    return datetime.datetime.now().strftime(pattern)


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"  # jinja's shows all it holds, however much that is


def _paid(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def paid(*arguments: Any, **named: Any) -> Any:
        budget.check_arguments((*arguments, *named.values()))
        return budget.made(function(*arguments, **named))

    return paid


class _PayByStep(NodeTransformer):
    """Puts the toll into the syntax tree, where jinja2 has no hook: loops, literals and `~`."""

    def _through(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._through(cast(nodes.Expr, node.iter), "_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno), "_concatenate")

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(node, "_made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(node, "_made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(node, "_made") if node.ctx == "load" else node


class _Generation(Extension):
    """`{% generation %}`, with which some templates tag what a model says; for rendering it is nothing."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    # It takes the context because then jinja2 leaves constant outputs to the render too, where there is a budget.
    budget.pay_as_text(value)
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
        ours: dict[str, Callable[..., Any]] = {
            "replace": budget.replaced,
            "join": budget.join_filter,
            "format": budget.formatted,
            "indent": budget.indented,
            "string": budget.to_string,
            "tojson": budget.to_json,
        }
        self.filters = {name: _paid(function) for name, function in {**given, **ours}.items()}
        self.filters |= {"_steps": budget.steps, "_made": budget.made, "_concatenate": budget.concatenated}
        self.globals = {
            **{name: self.globals[name] for name in ("range", "dict", "cycler", "joiner")},
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _now,
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        kept = []
        for part in parts:
            budget.pay(len(part) + 1)
            kept.append(part)
        return "".join(kept)

    def _generate(self, source: nodes.Template, *arguments: Any, **named: Any) -> str:
        _PayByStep().visit(source)
        source.set_environment(self)
        return super()._generate(source, *arguments, **named)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _REFUSED_ATTRIBUTES and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        budget.check_arguments((*arguments, *named.values()))
        budget.pay(1)
        if isinstance(function, LoopContext):  # a recursive loop goes down: its steps pay like any others
            arguments = (budget.steps(arguments[0]), *arguments[1:])
        owner, name = (
            getattr(getattr(function, "__wrapped__", function), "__self__", None),
            getattr(function, "__name__", ""),
        )
        if isinstance(owner, str) and name in ("replace", "join"):
            guarded: Callable[..., str] = budget.replaced if name == "replace" else budget.join_method
            return guarded(
                owner, *arguments, **{key: value for key, value in named.items() if key not in _JINJA_PASSES}
            )
        if isinstance(owner, str) and name in ("format", "format_map"):
            budget.pay_for_format(owner, [*arguments, *named.values()])
        return budget.made(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            budget.pay_for_format(left, right if isinstance(right, tuple) else [right])
        elif operator in ("*", "**"):
            budget.pay_for_product(operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))


class Sandbox:
    """One template, compiled; `name` stands for it in messages."""

    def __init__(self, source: str, name: str, seconds: float = SECONDS) -> None:
        if len(source) > TEMPLATE_CHARACTERS:
            raise InputError(
                f"{name}: a chat template of {len(source):,} characters; the limit is {TEMPLATE_CHARACTERS:,}"
            )
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
        size = sum(len(leaf) if isinstance(leaf, str) else 1 for leaf in budget.leaves(values))
        token = budget.current.set(budget.Budget(WORK + WORK_PER_INPUT_CHARACTER * size, self._seconds))
        try:
            return self._template.render(**values)
        except TemplateRefused as error:
            raise InputError(
                f"{self.name}: the chat template refuses these messages: {_line(error)}"
            ) from None
        except Exception as error:  # noqa: BLE001  as above
            raise InputError(f"{self.name}: the chat template was stopped: {_line(error)}") from None
        finally:
            budget.current.reset(token)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__
