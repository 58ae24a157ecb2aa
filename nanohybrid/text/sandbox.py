"""Rendering of chat templates from untrusted checkpoints.

jinja2's immutable sandbox keeps a template from Python's internals, but does not limit its time and memory.
So each render has a budget of time and of work. All operations are charged before they run: loop steps,
calls, filters, new lists, and strings that are joined, repeated or padded. Templates have the filters,
functions and extensions that transformers offers; filters that are not needed for chats are left out.
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
_JINJA_ARGUMENTS = {"_loop_vars", "_block_vars"}  # jinja2 passes these to every call
_REFUSED_ATTRIBUTES = {"expandtabs", "translate", "maketrans", "encode", "to_bytes"}


class TemplateRefused(Exception):
    """The template refuses the messages by `raise_exception`."""


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefused(message)


def _now(pattern: str) -> str:
    budget.charge_format(pattern, ())
    return datetime.datetime.now().strftime(pattern)


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"  # that of jinja2 shows all contents, of any size


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def charged(*arguments: Any, **named: Any) -> Any:
        budget.check_arguments((*arguments, *named.values()))
        return budget.charge_result(function(*arguments, **named))

    return charged


class _ChargeNodes(NodeTransformer):
    """Adds charging filters to the syntax tree where jinja2 has no hook: loops, literals and `~`."""

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
        return self._through(node, "_result")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(node, "_result")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(node, "_result") if node.ctx == "load" else node


class _Generation(Extension):
    """`{% generation %}`, which tags the model's text in some templates; it does not change the rendered
    text."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    # With the context as parameter, jinja2 calls this for constant outputs at render time too, where there is
    # a budget.
    budget.charge_text(value)
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
            "replace": budget.replace,
            "join": budget.join_filter,
            "format": budget.format_text,
            "indent": budget.indent,
            "string": budget.to_string,
            "tojson": budget.to_json,
        }
        self.filters = {name: _charged(function) for name, function in {**given, **ours}.items()}
        self.filters |= {
            "_steps": budget.charge_steps,
            "_result": budget.charge_result,
            "_concatenate": budget.concatenate,
        }
        self.globals = {
            **{name: self.globals[name] for name in ("range", "dict", "cycler", "joiner")},
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _now,
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        result = []
        for part in parts:
            budget.charge(len(part) + 1)
            result.append(part)
        return "".join(result)

    def _generate(self, source: nodes.Template, *arguments: Any, **named: Any) -> str:
        _ChargeNodes().visit(source)
        source.set_environment(self)
        return super()._generate(source, *arguments, **named)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _REFUSED_ATTRIBUTES and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        budget.check_arguments((*arguments, *named.values()))
        budget.charge(1)
        if isinstance(
            function, LoopContext
        ):  # a recursive loop: its steps are charged like those of other loops
            arguments = (budget.charge_steps(arguments[0]), *arguments[1:])
        owner, name = (
            getattr(getattr(function, "__wrapped__", function), "__self__", None),
            getattr(function, "__name__", ""),
        )
        if isinstance(owner, str) and name in ("replace", "join"):
            guarded: Callable[..., str] = budget.replace if name == "replace" else budget.join_method
            return guarded(
                owner,
                *arguments,
                **{key: value for key, value in named.items() if key not in _JINJA_ARGUMENTS},
            )
        if isinstance(owner, str) and name in ("format", "format_map"):
            budget.charge_format(owner, [*arguments, *named.values()])
        return budget.charge_result(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            budget.charge_format(left, right if isinstance(right, tuple) else [right])
        elif operator in ("*", "**"):
            budget.charge_product(operator, left, right)
        return budget.charge_result(super().call_binop(context, operator, left, right))


class Sandbox:
    """A compiled template; `name` is its name in error messages.

    Raises InputError where it is too long or does not compile.
    """

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
        except Exception as error:  # noqa: BLE001  an untrusted file may raise anything
            raise InputError(f"{name}: the chat template does not compile: {_line(error)}") from None

    def render(self, **values: Any) -> str:
        """The text for these values.

        Raises InputError where the template refuses the messages, fails or exceeds its budget.
        """
        size = sum(len(leaf) if isinstance(leaf, str) else 1 for leaf in budget.flatten(values))
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
