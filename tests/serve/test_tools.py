import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.serve.output_parser import OutputParser, ReasoningDelta
from nanohybrid.serve.tools import TextDelta, ToolCallArguments, ToolCallParser, ToolCallStart, merged

NAMES = frozenset({"add", "now"})


def read(text, cuts=()):
    reader, events, at = ToolCallParser(NAMES), [], 0
    for cut in [*sorted(cuts), len(text)]:
        events += reader.push(text[at:cut])
        at = max(at, cut)
    return merged([*events, *reader.end()])


def calls(text):
    """(content, [(name, arguments)]) of a text."""
    content, found = "", []
    for event in read(text):
        if isinstance(event, TextDelta):
            content += event.text
        elif isinstance(event, ToolCallStart):
            found.append([event.name, ""])
        else:
            found[event.call][1] += event.text
    return content, [(name, json.loads(arguments)) for name, arguments in found]


def block(*objects):
    return f"<TOOLCALL>[{', '.join(objects)}]</TOOLCALL>"


ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}'
WANTED = ("add", {"a": 1, "b": [2, {"c": "}"}]})


@pytest.mark.parametrize(
    ("text", "content", "found"),
    [
        (block(ADD), "", [WANTED]),
        (
            "Let me see.\n" + block(ADD, '{"name": "now", "arguments": {}}') + " done",
            "Let me see.\n done",
            [WANTED, ("now", {})],
        ),
        (block(ADD) + block(ADD), "", [WANTED, WANTED]),
        (f"<TOOLCALL>{ADD}</TOOLCALL>", "", [WANTED]),  # missing brackets
        (f"<TOOLCALL>[{ADD}", "", [WANTED]),  # missing ends
        (f"<TOOLCALL>[{ADD[:-1]}]</TOOLCALL>!", "!", [WANTED]),  # a missing brace
        (block('{"arguments": {"a": 1}, "name": "add"}'), "", [("add", {"a": 1})]),  # another order
        (
            block('{"name": "add", "id": 7, "parameters": {"a": 1}}'),
            "",
            [("add", {"a": 1})],
        ),  # more members, another name
        (
            block('{"name": "add", "arguments": "{\\"a\\": 1}"}'),
            "",
            [("add", {"a": 1})],
        ),  # arguments as a text
        (block('{"name": "now"}'), "", [("now", {})]),
        (block('{"name": "add", "arguments": {"a": 1}, "id": "x]"}'), "", [("add", {"a": 1})]),
        (
            block('{"name": "add", "arguments": {"mark": "</TOOLCALL>"}}'),
            "",
            [("add", {"mark": "</TOOLCALL>"})],
        ),
    ],
)
def test_tool_calls_are_parsed_and_repaired(text, content, found):
    assert calls(text) == (content, found)


@pytest.mark.parametrize(
    "text",
    [
        "plain < text <TOOL and </TOOLCALL> more",
        "<TOOLCALL>",
        "<TOOLCALL>[]</TOOLCALL>",
        "<TOOLCALL>hello</TOOLCALL>",
        block('{"name": "rm", "arguments": {"path": "/"}}'),  # was not offered
        block('{"name": add, "arguments": {}}'),
        block('{"name": "add", "arguments": [1]}'),
        block('{"name": "add", "arguments": "not JSON"}'),
        block('{"arguments": {"a": 1}}'),
        '<TOOLCALL>[{"name": "add", "argum',
        "<<<TOOLCALL",
        "",
    ],
)
def test_text_that_is_no_tool_call_is_content(text):
    assert calls(text) == (text, [])


def test_tool_call_arguments_are_emitted_while_they_are_written():
    reader = ToolCallParser(NAMES)
    assert reader.push('<TOOLCALL>[{"name": "add", "arguments": {"a') == [
        ToolCallStart(0, "add"),
        ToolCallArguments(0, '{"a'),
    ]
    assert reader.push('": 1') == [ToolCallArguments(0, '": 1')]
    assert reader.push("}}]</TOOLCALL>") == [ToolCallArguments(0, "}")]
    assert reader.end() == []


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "<TOOLCALL>",
            "</TOOLCALL>",
            "[",
            "]",
            "{",
            "}",
            ADD,
            '{"name": "add", "arguments": ',
            '"',
            "\\",
            ", ",
            " ",
            "<",
            "x",
            "é\n",
            "</think>",
        ]
    ),
    max_size=14,
).map("".join)
CUTS = st.sets(st.integers(0, 200), max_size=40)


@given(FRAGMENTS, CUTS)
def test_tool_call_parser_does_not_depend_on_how_the_text_is_cut(text, cuts):
    assert read(text, [cut for cut in cuts if cut < len(text)]) == read(text)


@given(st.text(alphabet="<TOLCA>/x{ ", max_size=40))
def test_tool_call_parser_keeps_all_text_without_calls(text):
    assert "".join(event.text for event in read(text)) == text


def part(text, cuts, **options):
    answer, parts, at = OutputParser(**options), [], 0
    for cut in [*sorted(cuts), len(text)]:
        parts += answer.push(text[at:cut])
        at = max(at, cut)
    parts += answer.end()
    reasoning = "".join(p.text for p in parts if isinstance(p, ReasoningDelta))
    content = "".join(p.text for p in parts if isinstance(p, TextDelta))
    return reasoning, content, merged([p for p in parts if not isinstance(p, (ReasoningDelta, TextDelta))])


@given(FRAGMENTS, CUTS, st.booleans(), st.booleans(), st.booleans())
def test_output_parser_does_not_depend_on_how_the_text_is_cut(text, cuts, thinking, budgeted, offered):
    options = dict(thinking=thinking, budgeted=budgeted, tools=NAMES if offered else frozenset())
    assert part(text, [cut for cut in cuts if cut < len(text)], **options) == part(text, [], **options)


def test_output_parser_splits_and_strips_reasoning_and_content():
    assert part("\n so </think>\n\n 42 \n", [], thinking=True)[:2] == ("so", "42")
    assert part("cut off </thi", [], thinking=True)[:2] == ("cut off </thi", "")
    assert part("a </think> b", [], thinking=False)[:2] == ("", "a </think> b")


def test_output_parser_drops_a_close_tag_after_the_budget_ended_the_trace():
    assert part("so\n</think>\n\nstill</think>42", [], thinking=True, budgeted=True)[:2] == ("so", "still42")
    assert part("so\n</think>\n\nsee </think>", [], thinking=True)[:2] == ("so", "see </think>")


def test_tool_call_inside_the_trace_is_reasoning():
    reasoning, content, found = part(f"{block(ADD)}</think>{block(ADD)}", [], thinking=True, tools=NAMES)
    assert (
        reasoning == block(ADD)
        and content == ""
        and [e.name for e in found if isinstance(e, ToolCallStart)] == ["add"]
    )


def test_output_parser_max_calls_drops_later_calls():
    text = f"see {block(ADD, ADD)}{block(ADD)} done"
    _, content, found = part(text, [], thinking=False, tools=NAMES, max_calls=1)
    assert (content, [e.name for e in found if isinstance(e, ToolCallStart)]) == ("see  done", ["add"])
    assert "".join(e.text for e in found if isinstance(e, ToolCallArguments)) == json.dumps(WANTED[1])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=[]), max_size=4), JSON, max_size=3),
    st.permutations(["name", "arguments", "id"]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_any_arguments_of_a_tool_call_can_be_written_as_json(arguments, order, in_a_string, ascii_only, data):
    """A lone surrogate must be escaped in an answer.

    NaN is not JSON, so it makes no call that has to be repaired.
    """
    written = json.dumps(arguments, ensure_ascii=True)
    if not ascii_only:  # a model writes characters, and escapes only what UTF-8 cannot hold
        written = (
            json.dumps(arguments, ensure_ascii=False)
            .encode("utf-16", "surrogatepass")
            .decode("utf-16", "replace")
        )
    members = {"name": '"add"', "id": "7", "arguments": json.dumps(written) if in_a_string else written}
    text = block("{" + ", ".join(f'"{key}": {members[key]}' for key in order) + "}")
    events = read(text, data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert events == read(text)
    content = "".join(event.text for event in events if not isinstance(event, ToolCallStart))
    assert json.dumps(content, ensure_ascii=False).encode()
    if not any(word in written for word in ("NaN", "Infinity")):
        assert [type(event) for event in events] == [ToolCallStart, ToolCallArguments] and json.loads(
            content
        ) == json.loads(written)


@pytest.mark.parametrize(
    ("written", "let_out"),
    [
        (r'{"a": "\ud83d"}', r'{"a": "\ud83d"}'),
        (json.dumps(r'{"a": "\ud83d"}'), r'{"a": "\ud83d"}'),
        (r'"{\"a\": \"\ud83d\"}"', r'{"a": "\ud83d"}'),
        ('{"a": 1e400, "b": 1.0000000000000000001}', '{"a": 1e400, "b": 1.0000000000000000001}'),
        ("{}", "{}"),
    ],
)
def test_tool_call_arguments_before_the_name_are_emitted_as_written(written, let_out):
    events = read(block('{"arguments": ' + written + ', "name": "add"}'))
    assert events == [ToolCallStart(0, "add"), ToolCallArguments(0, let_out)]


@pytest.mark.parametrize(
    "written", ['{"a": NaN}', '{"a": Infinity}', json.dumps('{"a": NaN}'), '{"a": 1,}', '{"a" 1}']
)
def test_tool_call_with_invalid_arguments_before_the_name_is_content(written):
    text = block('{"arguments": ' + written + ', "name": "add"}')
    assert not any(isinstance(event, ToolCallStart) for event in read(text))
