"""Chat templates of other models: named ones, arguments of calls, thinking that words switch."""

import json

import pytest

from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.text import ChatTemplate

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def user(text):
    return {"role": "user", "content": text}


def loop(arguments):
    """The second turn of a tool loop; the client sends back the arguments of its first."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
    ]


# As in Nemotron 3 and Qwen3-Coder: one parameter a line
ITEMS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>{{ v if v is string else v | tojson }}"
    "</parameter>{% endfor %}</function>{% endfor %}{% endfor %}"
)
TOJSON = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"  # noqa: E501
JOINS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '[' + c.function.arguments + ']' }}{% endfor %}{% endfor %}"  # noqa: E501
WRITES = JOINS.replace(" + ", " ~ ")
ASKS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
    "{{ a if c.function.arguments is string else a | tojson }}{% endfor %}{% endfor %}"
)
TEXT = '{"a":  1, "b": "é"}'  # two blanks, as a model may have written it


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (ITEMS, "<function=f><parameter=a>1</parameter><parameter=b>é</parameter></function>"),
        (TOJSON, '{"a": 1, "b": "é"}'),
        (JOINS, f"[{TEXT}]"),
        (WRITES, '[{"a": 1, "b": "é"}]'),
        (ASKS, TEXT),
    ],
    ids=["items", "tojson", "joins", "writes", "asks"],
)
def test_render_gives_arguments_of_tool_calls_in_the_form_that_the_template_takes(template, text):
    """OpenAI's clients send JSON text. `| items` fails on it, and `| tojson` would quote it a second time."""
    assert ChatTemplate(template).render(loop(TEXT)) == text
    if template != ASKS and template != JOINS:
        assert ChatTemplate(template).render(loop(json.loads(TEXT))) == text.replace("'", '"')


@pytest.mark.parametrize("arguments", ["{'a': 1}", "", "[1]", "3", '{"a": NaN', "null"])
def test_render_leaves_arguments_that_are_no_json_object_as_they_were_sent(arguments):
    assert ChatTemplate(JOINS).render(loop(arguments)) == f"[{arguments}]"
    with pytest.raises(InputError, match="stopped"):
        ChatTemplate(ITEMS).render(loop(arguments))


def test_render_writes_objects_in_arguments_as_json_not_as_python():
    nested = '{"a": {"b": [true, null]}}'
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments|items %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"  # noqa: E501
    assert ChatTemplate(template).render(loop(nested)) == 'a={"b": [true, null]}'


# The published Nano 2 template looks for /think anywhere in a message, before /no_think
SUBSTRINGS = (
    "{%- set ns = namespace(on=true) %}"
    "{%- for m in messages %}{% if m.role != 'assistant' %}"
    "{%- if '/think' in m.content %}{% set ns.on = true %}"
    "{%- elif '/no_think' in m.content %}{% set ns.on = false %}{% endif %}{% endif %}"
    "{{- '<SPECIAL_11>' ~ m.role ~ '\\n' ~ m.content.replace('/no_think', '') ~ '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<SPECIAL_11>Assistant\\n' }}"
    "{{- '<think>\\n' if ns.on else '<think></think>' }}{%- endif %}"
)


@pytest.mark.parametrize(
    "text", ["what is in /etc/thinkfan.conf?", "a </think> tag", "what is /think?", "plain", "/no_think"]
)
def test_thinking_off_stays_off_whatever_the_messages_contain(text, small):
    template = ChatTemplate(SUBSTRINGS)
    off = template.render([user(text)], thinking=False)
    assert off.endswith("<SPECIAL_11>Assistant\n<think></think>")
    assert text.replace("/no_think", "").strip() in off
    ids = template.encode(small, [user(text)], thinking=False)
    assert small.decode(ids).endswith("<think></think>")
    on = template.render([user(text)], thinking=True)
    assert on.endswith("<SPECIAL_11>Assistant\n<think>\n")
    assert off.count("<SPECIAL_11>") == on.count("<SPECIAL_11>") == 2


def test_thinking_none_lets_the_template_of_a_checkpoint_decide():
    template = ChatTemplate(SUBSTRINGS)
    assert template.render([user("see /etc/thinkfan.conf /no_think")]).endswith("<think>\n")


def test_from_directory_uses_the_template_for_tools_where_there_are_tools(tmp_path):
    """Else a model with two templates never sees the tools that it is offered."""
    named = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T{{ tools[0].function.name }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.from_directory(tmp_path)
    assert template.render([user("x")]) == "D" and template.render([user("x")], TOOLS) == "Tf"
    template.save(tmp_path / ".." / tmp_path.name)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    again = ChatTemplate.from_directory(tmp_path)
    assert again.render([user("x")]) == "D" and again.render([user("x")], TOOLS) == "Tf"


def test_from_directory_reads_additional_templates_beside_the_default(tmp_path, small):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ tools | length }}")
    (tmp_path / "chat_template.jinja").write_text("D")
    template = ChatTemplate.from_directory(tmp_path)
    assert template.render([], TOOLS) == "T1" and template.render([]) == "D"
    assert template.encode(small, [], TOOLS) == small.encode("T1")


@pytest.mark.parametrize(
    ("chat_template", "says"),
    [
        ([{"name": "tool_use", "template": "T"}], "an entry named default"),
        ([{"name": "default", "template": 3}], "must be a string"),
        ([{"name": None, "template": "x"}], "must be a string"),
    ],
)
def test_from_directory_refuses_named_templates_without_a_default(tmp_path, chat_template, says):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
    with pytest.raises(CheckpointError, match=says):
        ChatTemplate.from_directory(tmp_path)


def test_render_refuses_tools_for_a_template_that_does_not_show_them():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="does not show tools to the model"):
        template.render([user("x")], TOOLS)
    assert template.render([user("x")], []) == "x"


@pytest.mark.parametrize("view", ["items", "keys", "values"])
@pytest.mark.parametrize("use", ["{{ [d.%s()] * 40000 }}", "{{ ([d.%s()] * 40000) | string }}"])
def test_views_of_a_dictionary_are_charged_like_lists(view, use):
    """Else one C call writes a text of gigabytes."""
    source = "{% set s = 'a' * 100000 %}{% set d = {s: s} %}" + use % view
    with pytest.raises(InputError, match="too much work"):
        ChatTemplate(source).render([user("x")])


def test_thinking_cannot_be_turned_on_where_the_template_has_none():
    plain = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="no thinking to turn on"):
        plain.render([user("x")], thinking=True)
    assert plain.render([user("x")], thinking=False) == plain.render([user("x")]) == "x"
    assert ChatTemplate("{{ enable_thinking }}").render([], thinking=True) == "True"


def test_built_in_template_is_refused_for_a_vocabulary_without_its_special_tokens():
    """A Llama without a template would see `<SPECIAL_11>User` as nine tokens of text."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models

    from nanohybrid.text import Tokenizer

    raw = Raw(models.BPE(vocab={chr(33 + n): n for n in range(94)}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    with pytest.raises(InputError, match=r"no chat template, and its vocabulary has no <SPECIAL_10>"):
        ChatTemplate.default().encode(Tokenizer(raw), [user("x")])
