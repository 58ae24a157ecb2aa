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
    """(text, [(name, arguments)]) of what was read."""
    said, found = "", []
    for event in read(text):
        if isinstance(event, TextDelta):
            said += event.text
        elif isinstance(event, ToolCallStart):
            found.append([event.name, ""])
        else:
            found[event.call][1] += event.text
    return said, [(name, json.loads(arguments)) for name, arguments in found]


def block(*objects):
    return f"<TOOLCALL>[{', '.join(objects)}]</TOOLCALL>"


ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}'
WANTED = ("add", {"a": 1, "b": [2, {"c": "}"}]})


@pytest.mark.parametrize(
    ("text", "said", "found"),
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
def test_calls_are_found_and_repaired_where_there_is_one_meaning(text, said, found):
    assert calls(text) == (said, found)


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
def test_what_is_no_call_is_content_as_it_was_written(text):
    assert calls(text) == (text, [])


def test_arguments_come_while_they_are_written():
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
def test_a_text_cut_anywhere_gives_what_the_whole_gives(text, cuts):
    assert read(text, [cut for cut in cuts if cut < len(text)]) == read(text)


@given(st.text(alphabet="<TOLCA>/x{ ", max_size=40))
def test_nothing_is_lost_of_a_text_without_calls(text):
    assert "".join(event.text for event in read(text)) == text


def part(text, cuts, **options):
    answer, parts, at = OutputParser(**options), [], 0
    for cut in [*sorted(cuts), len(text)]:
        parts += answer.push(text[at:cut])
        at = max(at, cut)
    parts += answer.end()
    thought = "".join(p.text for p in parts if isinstance(p, ReasoningDelta))
    said = "".join(p.text for p in parts if isinstance(p, TextDelta))
    return thought, said, merged([p for p in parts if not isinstance(p, (ReasoningDelta, TextDelta))])


@given(FRAGMENTS, CUTS, st.booleans(), st.booleans(), st.booleans())
def test_an_answer_cut_anywhere_is_parted_the_same(text, cuts, thinking, budgeted, offered):
    options = dict(thinking=thinking, budgeted=budgeted, tools=NAMES if offered else frozenset())
    assert part(text, [cut for cut in cuts if cut < len(text)], **options) == part(text, [], **options)


def test_thought_and_answer_are_split_at_think_close_and_trimmed():
    assert part("\n so </think>\n\n 42 \n", [], thinking=True)[:2] == ("so", "42")
    assert part("cut off </thi", [], thinking=True)[:2] == ("cut off </thi", "")
    assert part("a </think> b", [], thinking=False)[:2] == ("", "a </think> b")


def test_a_think_close_that_comes_after_the_budget_ended_the_trace_is_dropped():
    assert part("so\n</think>\n\nstill</think>42", [], thinking=True, budgeted=True)[:2] == ("so", "still42")
    assert part("so\n</think>\n\nsee </think>", [], thinking=True)[:2] == ("so", "see </think>")


def test_a_call_inside_the_trace_is_thought():
    thought, said, found = part(f"{block(ADD)}</think>{block(ADD)}", [], thinking=True, tools=NAMES)
    assert (
        thought == block(ADD)
        and said == ""
        and [e.name for e in found if isinstance(e, ToolCallStart)] == ["add"]
    )


def test_where_calls_may_not_be_parallel_only_the_first_is_made():
    text = f"see {block(ADD, ADD)}{block(ADD)} done"
    _, said, found = part(text, [], thinking=False, tools=NAMES, max_calls=1)
    assert (said, [e.name for e in found if isinstance(e, ToolCallStart)]) == ("see  done", ["add"])
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
def test_whatever_arguments_a_model_writes_an_answer_can_hold_them(
    arguments, order, in_a_string, ascii_only, data
):
    """Half a surrogate pair can only be an escape in an answer; NaN is no JSON, and no call in an order that is repaired."""
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
    said = "".join(event.text for event in events if not isinstance(event, ToolCallStart))
    assert json.dumps(said, ensure_ascii=False).encode()
    if not any(word in written for word in ("NaN", "Infinity")):
        assert [type(event) for event in events] == [ToolCallStart, ToolCallArguments] and json.loads(
            said
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
def test_arguments_in_another_order_are_let_out_as_they_were_written(written, let_out):
    events = read(block('{"arguments": ' + written + ', "name": "add"}'))
    assert events == [ToolCallStart(0, "add"), ToolCallArguments(0, let_out)]


@pytest.mark.parametrize(
    "written", ['{"a": NaN}', '{"a": Infinity}', json.dumps('{"a": NaN}'), '{"a": 1,}', '{"a" 1}']
)
def test_arguments_that_are_no_json_make_no_call_in_another_order(written):
    text = block('{"arguments": ' + written + ', "name": "add"}')
    assert not any(isinstance(event, ToolCallStart) for event in read(text))
