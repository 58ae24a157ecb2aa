"""Problems from the test split, scored by their tasks; what counts as well formed."""

import random

import pytest
import torch

from nanohybrid import tasks
from nanohybrid.engine import LLM, Completion
from nanohybrid.errors import InputError
from nanohybrid.evaluate.recipe import GenerationConfig
from nanohybrid.evaluate.suites import (
    aggregate,
    answer_problems,
    by_difficulty,
    by_family,
    draw_problems,
    score_completion,
)
from nanohybrid.tasks import split_of


def test_draw_problems_are_distinct_held_out_and_the_same_for_a_seed():
    problems = draw_problems(("sums", "parity"), 40, seed=3)
    assert {split_of(p.prompt) for p in problems} == {"test"}
    assert len({p.prompt for p in problems}) == len(problems) > 60
    assert (
        problems
        == draw_problems(("sums", "parity"), 40, seed=3)
        != draw_problems(("sums", "parity"), 40, seed=4)
    )
    levels = [p.difficulty for p in problems if p.family == "sums"]
    counts = [levels.count(difficulty) for difficulty in tasks.get("sums").difficulties]
    assert max(counts) - min(counts) <= 1
    with pytest.raises(InputError, match="at least one family"):
        draw_problems((), 3)


def completion_of(text, reason="stop", tokens=20, thinking=5):
    return Completion(text, list(range(tokens)), reason, thinking, "natural", None, 10)


@pytest.mark.parametrize(
    ("text", "reason", "thinking", "correct", "well_formed"),
    [
        ("1+2=3\n</think>\n\n{}\n", "stop", True, 1, True),
        ("</think>\n\n{}\n", "stop", True, 1, True),
        (
            "1+2\n</think>\n\n1\n</think>\n\n{}\n",
            "stop",
            True,
            1,
            False,
        ),  # a second </think>: it continued to think in its answer
        ("{}\n", "stop", True, 0, False),  # the trace never ended, so there is no answer
        ("1+2=3\n</think>\n\n{}\n", "length", True, 0, False),  # did not stop
        ("{}\n", "stop", False, 1, True),
        ("1+2\n</think>\n\n{}\n", "stop", False, 1, False),  # thinking was off
        ("x\n", "stop", False, 0, True),
    ],
)
def test_score_completion_tells_correct_and_well_formed(text, reason, thinking, correct, well_formed):
    problem = tasks.get("sums").make(random.Random(0), 3, "test")
    found = score_completion(problem, completion_of(text.format(problem.answer), reason), thinking)
    assert (found.correct, found.well_formed) == (correct, well_formed)


def test_score_completion_counts_answer_tokens_without_inserted_ones_and_eos():
    problem = tasks.get("sums").make(random.Random(0), 3, "test")
    completion = Completion("a</think>b", list(range(20)), "stop", 5, "forced", None, 10, forced=range(5, 9))
    found = score_completion(problem, completion, True)
    assert (found.thinking_tokens, found.answer_tokens) == (5, 20 - 5 - 4 - 1)


def test_scores_by_family_and_difficulty_add_up_to_the_total():
    problems = draw_problems(("sums", "running"), 12)
    answers = [
        score_completion(p, completion_of(f"</think>{p.answer if i % 3 else 'x'}"), True)
        for i, p in enumerate(problems)
    ]
    whole, families, levels = aggregate(answers), by_family(answers), by_difficulty(answers)
    assert whole.accuracy == pytest.approx(
        sum(s.accuracy * s.problems for s in families.values()) / whole.problems
    )
    assert sum(s.problems for s in levels.values()) == whole.problems == 24
    assert whole.low < whole.accuracy < whole.high and set(families) == {"sums", "running"}


def test_answer_problems_does_not_depend_on_the_batch(checkpoint):
    llm, problems = LLM(checkpoint, torch.float32, max_num_seqs=8), draw_problems(("sums",), 6)
    config = GenerationConfig(
        thinking=True, thinking_budget=6, max_tokens=16, temperature=1.0, thinking_grace=2
    )
    together = answer_problems(llm, problems, config)
    assert together == answer_problems(llm, problems, config)
    assert together[0] == answer_problems(llm, problems[:1], config)[0]
    assert all(item.thinking_tokens <= 8 for item in together)
    done = []
    answer_problems(llm, problems, GenerationConfig(thinking=False, max_tokens=4), done.append)
    assert sum(done) == 6
