"""Hostile templates (escapes, endless loops, memory exhaustion), and the needs of real templates."""

import resource
import threading
import time

import pytest

from nanohybrid.errors import InputError
from nanohybrid.text.sandbox import TEMPLATE_CHARACTERS, Sandbox

DOUBLING = "{% set a = 'xxxxxxxxxxxxxxxx' %}" + "{% set a = a ~ a %}" * 40
NESTED = "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 40
ESCAPES = [
    "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ messages.append(1) }}",
    "{{ self.__init__.__globals__ }}",
]
HUNGRY = {
    "a huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops in macros": "{% macro m() %}{% for i in range(9999) %}x{% endfor %}{% endmacro %}"
    "{% for i in range(999) %}{{ m() }}{% endfor %}",
    "a recursive loop": "{% for i in range(99999) recursive %}"
    "{% if loop.depth < 3 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "macros that call "
    "twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "string times number": "{{ 'x' * 10**10 }}",
    "number times string": "{{ 10**9 * 'x' }}",
    "list times number": "{{ ([0] * 99999) * 99999 }}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "a tower of squares": "{% set a = 3 %}" + "{% set a = a * a %}" * 40,
    "doubling by ~": DOUBLING,
    "doubling by +": DOUBLING.replace("~", "+"),
    "doubling by join": DOUBLING.replace("a ~ a", "[a, a] | join"),
    "doubling by replace": DOUBLING.replace("a ~ a", "a | replace('x', 'xx')"),
    "doubling by the method replace": DOUBLING.replace("a ~ a", "a.replace('x', 'xx')"),
    "doubling by the method join": DOUBLING.replace("a ~ a", "a.join([a, a])"),
    "doubling by a block": DOUBLING.replace("{% set a = a ~ a %}", "{% set a %}{{ a }}{{ a }}{% endset %}"),
    "doubling by %": DOUBLING.replace("a ~ a", "'%s%s' % (a, a)"),
    "doubling by format": DOUBLING.replace("a ~ a", "'{0}{0}'.format(a)"),
    "doubling by format_map": DOUBLING.replace("a ~ a", "'{a}{a}'.format_map({'a': a})"),
    "doubling by the filter format": DOUBLING.replace("a ~ a", "'%s%s' | format(a, a)"),
    "nested lists": NESTED + "{{ a }}",
    "nested lists as JSON": NESTED.replace("[a, a]", "{'l': a, 'r': a}") + "{{ a | tojson }}",
    "padding": "{{ 'x' | center(10**10) }}",
    "padding by method": "{{ 'x'.ljust(10**10) }}",
    "padding by %": "{{ '%09999999999d' % 1 }}",
    "padding by a computed width": "{{ '%*d' % (10**9, 1) }}",
    "padding by format": "{{ '{:>9999999999}'.format('x') }}",
    "padding by a computed format": "{{ '{:>{w}}'.format('x', w='9999999999') }}",
    "indenting": "{{ ('x\\n' * 90000) | indent(90000) }}",
    "indenting JSON": "{{ [1] | tojson(indent=10**9) }}",
    "tabs": "{{ ('\\t' * 90000).expandtabs(90000) }}",
    "many large "
    "references": "{% set a = 'x' * 90000 %}{{ range(99999) | map(attribute='no', default=a) | join }}",
    "filling batches": "{{ [1] | batch(10**9, 'x') | list }}",
    "text by the filter lipsum": "{{ lipsum(n=1) }}",
    "constants": "{{ 'a' | center(10**10) }}{{ 'x' ~ ('y' * 10**10) }}",
}


def test_sandbox_namespace_does_not_show_its_contents():
    source = "{% set a = namespace(x=1) %}" + "{% set a = namespace(x=a, y=a) %}" * 40 + "{{ a }}"
    assert Sandbox(source, "t").render() == "<namespace>"


@pytest.mark.parametrize("source", ESCAPES)
def test_sandbox_keeps_templates_from_pythons_internals(source):
    try:
        text = Sandbox(source, "t").render(messages=[{"role": "user", "content": "x"}])
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert text == ""  # jinja2 makes some refused attributes undefined


@pytest.mark.alone
@pytest.mark.parametrize("name", HUNGRY)
def test_sandbox_stops_templates_that_run_long_or_produce_much(name):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError, match=r"^t: the chat template"):
        Sandbox(HUNGRY[name], "t", seconds=0.5).render(messages=[])
    assert time.monotonic() - started < 2.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_sandbox_time_limit_holds_outside_the_main_thread():
    caught: list[str] = []

    def render() -> None:
        try:
            Sandbox(
                "{% for i in range(9999) %}{% for j in range(99) %}{% endfor %}{% endfor %}",
                "t",
                seconds=0.05,
            ).render()
        except InputError as error:
            caught.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert caught == ["t: the chat template was stopped: it ran longer than 0.05 seconds"]


def test_sandbox_refuses_a_template_that_is_too_long_or_does_not_compile():
    with pytest.raises(InputError, match="limit is 262,144"):
        Sandbox("x" * (TEMPLATE_CHARACTERS + 1), "t")
    for source in (
        "{% if %}",
        "{{ 1 + }}",
        "{{ x | shell }}",
        "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    ):
        with pytest.raises(InputError, match=r"^t: the chat template does not compile"):
            Sandbox(source, "t")


def test_sandbox_reports_raise_exception_in_the_templates_words():
    with pytest.raises(InputError, match="t: the chat template refuses these messages: roles must alternate"):
        Sandbox("{{ raise_exception('roles must alternate') }}", "t").render()


def test_sandbox_renders_what_real_templates_use_as_jinja2_does():
    source = """{%- set ns = namespace(last=-1, text='') -%}
{%- for m in messages if m.role != 'tool' -%}
    {%- if loop.index0 > 3 %}{% break %}{% endif -%}
    {%- set ns.last = loop.index0 -%}
    {%- set ns.text = ns.text ~ m['content'].strip().split('|')[-1] -%}
{%- endfor -%}
{%- generation %}{{ ns.last }}:{{ ns.text }}{% endgeneration -%}
{{- '[%s,%d]' % ('é', 3) }}{{ '{}-{x}'.format(1, x=2) }}{{ {'a': [1, 'é']} | tojson }}{{ {'a': 1} | tojson(indent=2) }}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}{{ messages[::-1][0].content }}
{{- (messages | length) * 2 + 1 }}{{ 'ab' * 2 }}{{ 'a\\nb' | indent(2) }}{{ strftime_now('%Y') | length }}{{ [1] + [2] }}
{%- macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m('q') %}w{% endcall %}{{ 'x' in 'xyz' }}{{ x is defined }}
{%- for key, value in {'k': 'v'}.items() %}{{ key }}={{ value }}{% endfor %}"""  # noqa: E501
    messages = [
        {"role": "user", "content": " a|b "},
        {"role": "tool", "content": "t"},
        {"role": "user", "content": "c"},
    ]
    assert Sandbox(source, "t").render(messages=messages) == (
        '1:bc[é,3]1-2{"a": [1, "é"]}{\n  "a": 1\n} a|b , cc7aba\n  b'.replace("7aba", "7ababa")
        + "4[1, 2]<qw>TrueFalsek=v"
    )


def test_sandbox_budget_suffices_for_a_long_conversation():
    messages = [{"role": "user", "content": "word " * 400}] * 1_000
    source = (
        "{% for m in messages %}{{ m.content.replace('a', 'b').strip() | trim }}"
        "{{ messages[loop.index0].role ~ '\n' }}{% endfor %}"
    )
    assert len(Sandbox(source, "t").render(messages=messages)) > 1_900_000
