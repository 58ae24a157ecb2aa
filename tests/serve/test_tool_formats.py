"""Reasoning and tool calls in the format of the checkpoint's own template: Qwen3, Nemotron 3, Llama 3."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import CONFIG, force_answer, sse, started

from nanohybrid.engine import SamplingParams
from nanohybrid.engine.random_weights import stand_in_tokenizer
from nanohybrid.engine.request import Request
from nanohybrid.engine.thinking import Thinking
from nanohybrid.serve.output_parser import OutputParser, ReasoningDelta
from nanohybrid.serve.structured_output import tool_call_grammar
from nanohybrid.serve.tools import TextDelta, ToolCallStart, merged
from nanohybrid.serve.xml_tools import argument
from nanohybrid.text import ChatTemplate
from nanohybrid.text.tool_format import HERMES, JSON, NEMOTRON, XML, tool_format

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"type": "string", "enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "where": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
    "required": ["city", "days"],
}
TOOLS = {"weather": SCHEMA, "now": {}}
OFFERED = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()
]
CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
MARKUP = '<b class="x">\n\n  "Oslo" \\ </b>'
WEATHER = ("weather", {"city": "Oslo", "days": 3})
# What the templates of these models have in common with the published ones: how they think and call tools
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    '{% if tools %}{{ tools | tojson }}<tool_call>\\n{"name": <function-name>}</tool_call>{% endif %}'
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
NEMOTRON3 = (
    "{% for m in messages %}{{ m.role + '\\n' + m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<tool_call>\\n<function=example>\\n<parameter=a>{% endif %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}"
    "{% set off = enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' if off else '<think>\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ m.role + '\\n' + m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}"
    'Respond in the format {"name": function name, "parameters": dictionary of arguments}{% endif %}'
)


@pytest.fixture(scope="module")
def tokenizer():
    return stand_in_tokenizer(CONFIG)


def parsed(text, cuts=(), format=HERMES, tools=TOOLS, **options):
    """(reasoning, content, [(name, arguments as JSON)]) of an answer that comes in pieces."""
    parser, deltas, at = OutputParser(False, tools, tool_format=format, **options), [], 0
    for cut in [*sorted(cuts), len(text)]:
        deltas += parser.push(text[at:cut])
        at = max(at, cut)
    deltas += parser.end()
    reasoning, content, calls = "", "", []
    for delta in deltas:
        if isinstance(delta, ReasoningDelta):
            reasoning += delta.text
        elif isinstance(delta, TextDelta):
            content += delta.text
        elif isinstance(delta, ToolCallStart):
            calls.append([delta.name, ""])
        else:
            calls[delta.call][1] += delta.text
    return reasoning, content, [tuple(call) for call in calls]


def calls_of(text, **options):
    _, content, calls = parsed(text, **options)
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


# Which format


def test_tool_format_is_that_of_the_template():
    assert tool_format(QWEN3) == HERMES and tool_format(NEMOTRON3) == XML and tool_format(LLAMA3) == JSON
    assert ChatTemplate.default().tool_format == NEMOTRON and tool_format("{{ tools }}") is None
    assert tool_format("<tool_call>{name}\n<arg_key>{key}</arg_key>") is None  # GLM: not read


def test_formats_and_thinking_of_published_templates():
    """TRL's wheel has the templates of many models; NANOHYBRID_TRL names a folder with the unpacked wheel."""
    folder = Path(os.environ.get("NANOHYBRID_TRL", "")) / "trl" / "chat_templates"
    if not (folder / "qwen3.jinja").is_file():
        pytest.skip("NANOHYBRID_TRL does not name a folder with TRL's unpacked wheel (pip download trl)")
    found = {
        name: (template.tool_format, template.model_opens_thinking)
        for name in (
            "qwen3",
            "qwen3_instruct_2507",
            "qwen2_5",
            "nemotron_3_nano",
            "nemotron_3_super",
            "llama3_1",
        )
        for template in [ChatTemplate((folder / f"{name}.jinja").read_text())]
    }
    assert found == {
        "qwen3": (HERMES, True),
        "qwen3_instruct_2507": (HERMES, False),
        "qwen2_5": (HERMES, False),
        "nemotron_3_nano": (XML, False),
        "nemotron_3_super": (XML, False),
        "llama3_1": (JSON, False),
    }


def test_model_opens_thinking_where_the_prompt_does_not():
    assert ChatTemplate(QWEN3).model_opens_thinking
    assert not ChatTemplate(NEMOTRON3).model_opens_thinking and not ChatTemplate(LLAMA3).model_opens_thinking
    assert not ChatTemplate.default().model_opens_thinking


# Reading calls


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
        (HERMES, f"Hm.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "Hm.", 2 * [WEATHER]),
        (HERMES, f"<tool_call>\n{CALL}", "", [WEATHER]),
        (HERMES, '<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call>', None, []),
        (HERMES, f"<TOOLCALL>[{CALL}]</TOOLCALL>", None, []),
        (HERMES, '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
        (HERMES, '<tool_call>{"name": "now", "arguments": ""}</tool_call>', "", [("now", {})]),
        (JSON, CALL.replace("arguments", "parameters"), "", [WEATHER]),
        (JSON, "  " + CALL + "; " + CALL, "", 2 * [WEATHER]),
        (JSON, '{"city": "Oslo"}', None, []),
        (JSON, f"It is {CALL}", None, []),
        (XML, XML_CALL, "", [WEATHER]),
        (XML, f"Let me see.\n{XML_CALL}\n{XML_CALL}\nDone", "Let me see.\n\n\nDone", 2 * [WEATHER]),
        (XML, XML_CALL.removeprefix("<tool_call>\n"), "", [WEATHER]),
        (XML, XML_CALL.removesuffix("\n</tool_call>"), "", [WEATHER]),
        (XML, XML_CALL.replace("</function>\n", ""), "", [WEATHER]),
        (XML, XML_CALL.replace("\n</parameter>\n<parameter=days", "\n<parameter=days"), "", [WEATHER]),
        (XML, "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [("now", {})]),
        (XML, XML_CALL.replace("=weather", "=no_such_tool"), None, []),
        (XML, "a < b, <b>x</b> and <tool_call> in prose", None, []),
        (XML, XML_CALL.replace("Oslo", MARKUP), "", [("weather", {"city": MARKUP, "days": 3})]),
    ],
)  # fmt: skip
def test_calls_are_read_in_the_format_of_the_model(format, text, content, calls):
    """content None: the text as the model wrote it."""
    found = calls_of(text, format=format)
    if format == XML and calls and content:
        assert found[1] == calls and found[0].split() == content.split()
    else:
        assert found == (text if content is None else content, calls)


@given(
    st.sampled_from([HERMES, XML, JSON, NEMOTRON]),
    st.lists(
        st.sampled_from(
            [
                XML_CALL, CALL, f"<tool_call>{CALL}</tool_call>", "<think>", "</think>", "\n", "<tool_call>",
                "</tool_call>", "<function=now>", "</function>", "<parameter=city>", "</parameter>", "x",
                "<function=weather>", "<", " é ", "{", "}", '"', "<function=", "=",
                "<parameter=" + "y" * 300 + ">",
            ]
        ),
        max_size=9,
    ).map("".join),
    st.sets(st.integers(0, 400), max_size=12),
    st.booleans(),
)  # fmt: skip
def test_parsing_does_not_depend_on_how_the_text_is_cut(format, text, cuts, may_think):
    whole = parsed(text, format=format, may_think=may_think)
    assert parsed(text, cuts, format, may_think=may_think) == whole
    assert parsed(text, range(len(text)), format, may_think=may_think) == whole
    for _, arguments in whole[2][:-1]:  # the last one may be cut
        json.loads(arguments)


@pytest.mark.parametrize("order", ["{{{name}, {arguments}}}", "{{{arguments}, {name}}}"])
def test_raw_newlines_in_arguments_become_escapes_in_any_order_of_members(order):
    """The commonest fault of models that write code; no client can parse it as it is."""
    text = order.format(name='"name": "now"', arguments='"arguments": {"code": "a = 1\n\tb\\n"}')
    for cuts in ((), range(len(text))):
        _, content, calls = parsed(f"<tool_call>{text}</tool_call>", cuts)
        assert content == "" and [(n, json.loads(a)) for n, a in calls] == [("now", {"code": "a = 1\n\tb\n"})]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5.5", {"type": ["number", "null"]}, 5.5),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("True", {"type": "boolean"}, True),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ('{"a": 1}', {"$ref": "#/x"}, {"a": 1}),
        ("{not json", {"type": "object"}, "{not json"),
        ("NaN", {"type": "number"}, "NaN"),
        ("5", {}, "5"),
        ("5", None, "5"),
        ("a", {"enum": ["a", 1]}, "a"),
    ],
)
def test_xml_argument_has_the_type_of_its_schema(text, schema, value):
    assert argument(text, schema) == value and type(argument(text, schema)) is type(value)


# Thinking that the model opens


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nplan\n</think>\n\nanswer", "plan", "answer"),
        ("\n<think>plan</think>answer", "plan", "answer"),
        ("answer", "", "answer"),
        ("<thin air> answer", "", "<thin air> answer"),
        ("<think>cut", "cut", ""),
        ("<thi", "", "<thi"),
        ("answer <think>x</think>", "", "answer <think>x</think>"),
    ],
)
def test_think_tag_at_the_beginning_of_an_answer_opens_its_reasoning(text, reasoning, content):
    for cuts in ((), range(len(text))):
        assert parsed(text, cuts, tools={}, may_think=True) == (reasoning, content, [])
    assert parsed(text, tools={})[0] == ""  # where the model does not think, it is text


def test_think_tag_that_the_model_repeats_is_no_reasoning():
    parser = OutputParser(True)
    deltas = merged([*parser.push("<think>I'm\nthinking</think>Hello"), *parser.end()])
    assert deltas == [ReasoningDelta("I'm\nthinking"), TextDelta("Hello")]


def run(watch, pieces):
    """The text of an answer whose tokens are `pieces`, with what the budget inserts."""
    text = (watch.begin() or "").encode()
    for piece in pieces:
        text += piece
        inserted = watch.push(piece) if watch.active else None
        if inserted is not None:
            return text + inserted.encode()
    return text


def test_budget_of_a_trace_that_the_model_opens():
    pieces = [b"<think>", b"\n", b"a", b"b", b"\n", b"c"]
    watch = Thinking(b"assistant\n", 2, 10, opened=False)
    assert run(watch, pieces) == b"<think>\nab\n</think>\n\n"
    assert (watch.end, watch.tokens) == ("newline", 4)
    watch = Thinking(b"assistant\n", 2, 10, opened=False)
    assert run(watch, [b"an", b"swer\n", b"x", b"\n"]) == b"answer\nx\n"
    assert (watch.end, watch.tokens, watch.active) == ("none", 0, False)
    watch = Thinking(b"assistant\n", 0, 10, opened=False)
    assert run(watch, []) == b"<think>\n</think>\n\n" and not watch.active


def test_request_keeps_the_budget_of_a_trace_that_the_model_opens(tokenizer):
    prompt = tokenizer.encode("assistant\n")
    params = SamplingParams(max_tokens=200, thinking_budget=3, thinking_grace=2, may_think=True)
    request = Request(0, prompt, params, tokenizer, seed=0)
    for token in tokenizer.encode("<think>\nabcdefgh"):
        request.accept(request.forced[0] if request.forced else token)
        if request.thinking.end != "none":
            break
    while request.forced:
        request.accept(request.forced[0])
    request.finish_reason = "stop"
    done = request.completion()
    assert done.thinking_end == "forced" and done.thinking_tokens <= 6
    assert done.text.startswith("<think>") and done.text.endswith("\n</think>\n\n")


# Over HTTP


@pytest.fixture(
    params=[(QWEN3, HERMES), (NEMOTRON3, XML), (LLAMA3, JSON)], ids=["qwen3", "nemotron3", "llama3"]
)
def served(request):
    """A server whose template is that of another family."""
    source, format = request.param
    with started(max_model_len=2048) as serve:
        serve.service.llm.__dict__["template"] = ChatTemplate(source)
        yield serve, format


WRITTEN = {
    HERMES: f"<think>\nplan\n</think>\n\nI look.\n<tool_call>\n{CALL}\n</tool_call>",
    XML: f"plan\n</think>\n\nI look.\n{XML_CALL}",
    JSON: CALL.replace("arguments", "parameters"),
}


def test_reasoning_and_calls_come_back_in_their_own_fields(served, monkeypatch):
    serve, format = served
    force_answer(serve, monkeypatch, WRITTEN[format])
    whole = serve.chat(tools=OFFERED, max_tokens=900).json()["choices"][0]
    message = whole["message"]
    assert whole["finish_reason"] == "tool_calls"
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == WEATHER
    wanted = (None, None) if format == JSON else ("plan", "I look.")
    assert (message["reasoning_content"], message["content"]) == wanted
    streamed = {"reasoning_content": "", "content": "", "arguments": ""}
    for event in sse(serve.chat(tools=OFFERED, max_tokens=900, stream=True)):
        for choice in event["choices"]:
            delta = choice["delta"]
            for name in ("reasoning_content", "content"):
                streamed[name] += delta.get(name) or ""
            for part in delta.get("tool_calls") or ():
                streamed["arguments"] += part["function"]["arguments"]
    assert json.loads(streamed["arguments"]) == WEATHER[1]
    assert (streamed["reasoning_content"] or None, streamed["content"] or None) == wanted


def test_thinking_turned_off_is_no_trace_for_a_model_that_opens_it_itself(served, monkeypatch):
    serve, format = served
    force_answer(serve, monkeypatch, "answer")
    answer = serve.chat(max_tokens=50, chat_template_kwargs={"enable_thinking": False}).json()
    assert answer["choices"][0]["message"]["content"] == "answer"
    prompt = serve.service.llm.encode_chat([{"role": "user", "content": "x"}], False)
    assert not serve.service.llm.may_think(prompt)
    assert serve.service.llm.may_think(serve.service.llm.encode_chat([{"role": "user", "content": "x"}])) == (
        format == HERMES
    )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_written_in_the_format_of_the_model(served, choice):
    """The model is random: only the grammar makes calls of it, which the parser must read back."""
    serve, _ = served
    answer = serve.chat(
        tools=OFFERED, tool_choice=choice, max_tokens=900, seed=1, temperature=1.0, thinking_budget=4,
        thinking_grace=2, logit_bias={},
    ).json()  # fmt: skip
    (choice_,) = answer["choices"]
    message = choice_["message"]
    if choice_["finish_reason"] == "length":  # a string without end: the call is cut, and is one
        assert message["tool_calls"][0]["function"]["name"] in TOOLS
        return
    (call,) = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "weather":
        assert isinstance(arguments["city"], str) and isinstance(arguments["days"], int)
        assert set(arguments) <= set(SCHEMA["properties"])
        assert arguments.get("units", "C") in ("C", "F")
    assert not message["content"]


def test_tools_are_refused_where_the_template_shows_no_known_format(served, monkeypatch):
    serve, _ = served
    serve.service.llm.__dict__["template"] = ChatTemplate("{{ tools }}{% for m in messages %}x{% endfor %}")
    answer = serve.chat(tools=OFFERED)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
    serve.service.llm.__dict__["template"] = ChatTemplate("{% for m in messages %}x{% endfor %}")
    answer = serve.chat(tools=OFFERED)
    assert answer.status_code == 400 and "does not show tools" in answer.json()["error"]["message"]
    assert serve.chat(tools=OFFERED, tool_choice="none", max_tokens=2).status_code == 200


@pytest.mark.parametrize("format", [NEMOTRON, HERMES, XML, JSON])
def test_grammar_of_a_forced_call_accepts_what_the_parser_reads(format, tokenizer):
    guidance = pytest.importorskip("llguidance")
    from nanohybrid.engine.params import StructuredOutputs
    from nanohybrid.engine.structured_output import GrammarCompiler, GrammarState

    assert guidance
    grammar = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({tokenizer.eos_id})).compile(
        StructuredOutputs(grammar=tool_call_grammar(TOOLS, format))
    )
    text = {
        NEMOTRON: f"<TOOLCALL>[{CALL}]</TOOLCALL>",
        HERMES: f"<tool_call>\n{CALL}\n</tool_call>",
        XML: XML_CALL,
        JSON: CALL.replace("arguments", "parameters"),
    }[format]
    state, ids = GrammarState(grammar), tokenizer.encode(text, parse_special=False)
    for at, token in enumerate(ids):
        assert state.allowed(ids[:at])[token], f"{text} after {tokenizer.decode(ids[:at])!r}"
    assert state.allowed(ids)[tokenizer.eos_id]
    assert calls_of(text, format=format) == ("", [WEATHER])


def test_reasoning_of_earlier_turns_reaches_a_template_that_shows_it(served):
    serve, _ = served
    shows = "{% for m in messages %}[{{ m.reasoning_content or '' }}|{{ m.content }}]{% endfor %}"
    serve.service.llm.__dict__["template"] = ChatTemplate(shows)
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "reasoning_content": "plan"},
        {"role": "user", "content": "r"},
    ]
    answer = serve.http.post("/tokenize", json={"messages": turns})
    assert answer.status_code == 200
    assert serve.service.llm.tokenizer.decode(answer.json()["tokens"]) == "[|q][plan|][|r]"
