import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.request import Request
from nanohybrid.engine.thinking import Thinking, closing, opens


@pytest.mark.parametrize(
    ("tail", "inserted"),
    [
        (b"so 7\n", "</think>\n\n"),
        (b"so 7\n  ", "</think>\n\n"),
        (b"so 7", "\n</think>\n\n"),
        (b"so 7\n</thi", "nk>\n\n"),
        (b"so 7</", "think>\n\n"),
        (b"so 7</think", ">\n\n"),
        (b"<think>", "\n</think>\n\n"),
        (b"<think>\n", "</think>\n\n"),
        (b"", "\n</think>\n\n"),
    ],
)
def test_closing_completes_a_partial_tag_on_a_line_of_its_own(tail, inserted):
    assert closing(tail) == inserted


def test_trace_is_open_only_where_the_prompt_ends_in_think():
    assert opens(b"Assistant\n<think>\n") and opens(b"<think>")
    assert not opens(b"<think></think>") and not opens(b"what does <think> do?") and not opens(b"")


def think(pieces, budget, grace, prompt=b"<think>\n"):
    """Add tokens until the trace ends. Returns the watcher, the text of the trace, the number of tokens."""
    watch = Thinking(prompt, budget, grace)
    inserted = watch.begin()
    text, used = b"", 0
    for piece in pieces:
        if not watch.active:
            break
        text, used = text + piece, used + 1
        inserted = watch.push(piece)
    return watch, text + (inserted or "").encode(), used


def test_thinking_ends_at_the_first_newline_after_the_budget():
    watch, text, used = think([b"a", b"\n", b"b", b"c", b"\n", b"d"], 3, 10)
    assert (watch.end, watch.tokens, used, text) == ("newline", 5, 5, b"a\nbc\n</think>\n\n")


def test_thinking_ends_after_the_grace_without_a_newline():
    watch, text, used = think([b"x"] * 50, 3, 4)
    assert (watch.end, watch.tokens, used, text) == ("forced", 7, 7, b"xxxxxxx\n</think>\n\n")


def test_thinking_budget_of_0_ends_before_the_first_token():
    watch = Thinking(b"<think>\n", 0, 500)
    assert (watch.begin(), watch.active, watch.end, watch.tokens) == ("</think>\n\n", False, "newline", 0)
    watch = Thinking(b"<think>", 0, 500)
    assert (watch.begin(), watch.end) == ("\n</think>\n\n", "forced")


@pytest.mark.parametrize(
    "spelling",
    [[b"</", b"think", b">"], [b"</", b"think", b">\n\n"], [b" </", b"think", b">\n"], [b"x</think>y"]],
)
def test_thinking_natural_end_is_recognized_in_every_tokenization(spelling):
    watch, text, _ = think([b"a", b"\n", *spelling, b"answer"], 100, 5)
    assert watch.end == "natural" and text == b"a\n" + b"".join(spelling)


def test_thinking_close_tag_begun_at_the_limit_is_completed():
    watch, text, _ = think([b"a", b"</", b"thi", b"zz"], 3, 0)
    assert (watch.end, text) == ("forced", b"a</think>\n\n")


def test_thinking_ignores_the_close_tag_of_an_earlier_turn():
    watch, _text, _ = think([b"a", b"b"], None, 0, prompt=b"</think>hi\nYou\nA\n<think>\n")
    assert watch.active and watch.end == "none"


@given(
    st.lists(
        st.sampled_from(
            [b"a", b" ", b"\n", b"<", b"</", b"</thi", b"nk>", b"think>", b".\n\n", b"</think>\n"]
        ),
        max_size=40,
    ),
    st.integers(0, 12),
    st.integers(0, 6),
)
def test_thinking_has_one_close_tag_within_the_budget(pieces, budget, grace):
    watch, text, used = think([*pieces, *[b"z"] * 20], budget, grace)
    assert text.count(b"</think>") == 1
    assert watch.tokens == used <= budget + (grace if budget else 0)
    if watch.end == "natural":
        assert b"</think>" in b"".join(pieces[:used])
    else:
        assert text.endswith(b"</think>\n\n") and used >= budget


def test_request_writes_forced_tokens_instead_of_sampled_ones(tokenizer):
    params = SamplingParams(max_tokens=40, thinking_budget=2, thinking_grace=1)
    request = Request(
        0, tokenizer.encode("<think>\n"), params, tokenizer, seed=0, stop_ids=tokenizer.stop_ids
    )
    a = tokenizer.encode("a")[0]
    while not request.accept(request.forced[0] if request.forced else a if len(request.tokens) < 20 else 12):
        pass
    done = request.completion()
    assert done.text == "aaa\n</think>\n\naaaaaa" and done.finish_reason == "stop"
    assert (done.thinking_tokens, done.thinking_end) == (3, "forced")
    assert tokenizer.decode([done.token_ids[i] for i in done.forced]) == "\n</think>\n\n"
