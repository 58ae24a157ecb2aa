"""Chats to learn from: what is in them, and what of it is learned."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.align.chats import ChatMaker, Shares, Way, chats
from nanohybrid.align.truncate import truncate, truncated
from nanohybrid.errors import ConfigError
from nanohybrid.tasks import Problem

PROBLEM = Problem("running", 2, "run 1+2*3", "1+2=3\n3*3=9", "9")
HEAD = "<SPECIAL_10>System\n\n<SPECIAL_11>User\nrun 1+2*3\n<SPECIAL_11>Assistant\n"


def learned(maker: ChatMaker, way: Way, seed: int = 0) -> tuple[str, str]:
    """The whole chat, and the same with everything that carries no loss as dots."""
    chat = maker.chat(PROBLEM, way, random.Random(seed))
    assert len(chat.tokens) == len(chat.loss)
    decode = maker.tokenizer.decode
    marked = "".join(
        decode([token], skip_special_tokens=False) if loss else "."
        for token, loss in zip(chat.tokens, chat.loss, strict=True)
    )
    return decode(chat.tokens, skip_special_tokens=False), marked.strip(".")


def test_a_thinking_chat_learns_trace_think_close_answer_and_end_and_not_the_prompt(maker: ChatMaker) -> None:
    whole, part = learned(maker, "thinking")
    assert part == "1+2=3\n3*3=9\n</think>\n\n9\n<SPECIAL_12>" and whole == f"{HEAD}<think>\n{part}"


def test_a_direct_chat_learns_only_its_answer(maker: ChatMaker) -> None:
    whole, part = learned(maker, "direct")
    assert part == "9\n<SPECIAL_12>" and whole == f"{HEAD}<think></think>{part}"


def test_a_truncated_chat_does_not_learn_where_it_was_cut(maker: ChatMaker) -> None:
    found = {learned(maker, "truncated", seed) for seed in range(20)}
    assert {whole.removeprefix(HEAD) for whole, _ in found} == {
        "<think>\n</think>\n\n9\n<SPECIAL_12>",
        "<think>\n1+2=3\n</think>\n\n9\n<SPECIAL_12>",
    }
    dots = {"".join(part.split(".")) for _, part in found}
    assert dots == {"9\n<SPECIAL_12>", "1+2=3\n9\n<SPECIAL_12>"}


def test_the_prompt_of_training_is_the_prompt_of_inference(maker: ChatMaker) -> None:
    for way, thinking in (("thinking", True), ("direct", False)):
        prompt = maker.prompt(PROBLEM, thinking)
        assert maker.chat(PROBLEM, way, random.Random(0)).tokens[: len(prompt)] == prompt


@given(st.lists(st.text("0123456789+=", min_size=1), min_size=1, max_size=8), st.integers())
def test_a_cut_trace_is_a_beginning_in_whole_lines(lines: list[str], seed: int) -> None:
    trace = "\n".join(lines)
    cut = truncated(trace, random.Random(seed))
    assert cut == "" or (lines[: cut.count("\n") + 1] == cut.split("\n") and len(cut) < len(trace))
    assert truncate(trace, len(lines)) == trace and truncate(trace, 0) == ""


def test_shares_hold_and_chats_are_a_function_of_the_seed(maker: ChatMaker) -> None:
    rng = random.Random(0)
    counted = Counter(Shares(0.5, 0.25, 0.25, 0.0).draw(rng) for _ in range(2000))
    assert abs(counted["thinking"] - 1000) < 100 and abs(counted["direct"] - 500) < 80
    first, again, other = (list(chats(maker, ["sums", "running"], Shares(), 500, seed)) for seed in (1, 1, 2))
    assert first == again != other and sum(len(chat.tokens) for chat in first) >= 500
    with pytest.raises(ConfigError, match="must not be negative"):
        Shares(thinking=-1)
