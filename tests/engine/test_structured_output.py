"""Structured output of the engine.

Answers are checked by jsonschema and re, which share nothing with llguidance.
"""

import json
import re
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from nanohybrid.engine import Engine, SamplingParams, StructuredOutputs
from nanohybrid.engine.request import Request
from nanohybrid.engine.structured_output import GrammarCompiler
from nanohybrid.errors import InputError, MissingExtraError, NanohybridError
from nanohybrid.text import Tokenizer

pytest.importorskip("llguidance")
RATING = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "scores": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["city", "scores"],
    "additionalProperties": False,
}
RATED = SamplingParams(
    max_tokens=120, temperature=1.0, seed=1, structured_outputs=StructuredOutputs(json=RATING)
)
FREE = SamplingParams(max_tokens=60, temperature=1.0, seed=1, ignore_eos=True)


def engine_of(model, tokenizer, **options) -> Engine:
    return Engine(model, tokenizer, **{"max_num_seqs": 4, "max_model_len": 400, **options})


def answer(completion) -> str:
    return completion.text.rpartition("</think>")[2].strip()


def valid(completion, schema=RATING) -> bool:
    jsonschema.validate(json.loads(answer(completion)), schema)
    return completion.finish_reason == "stop"


@pytest.mark.parametrize("kernels", ["model", "packed"])
def test_json_answers_are_valid_beside_unconstrained_requests(request, tokenizer, kernels):
    engine = engine_of(request.getfixturevalue(kernels), tokenizer)
    free = engine.generate([[40, 41]], FREE)[0]
    params = [replace(RATED, seed=seed) for seed in range(3)] + [FREE]
    *rated, beside = engine.generate([[50, 51], [60], [40, 41], [40, 41]], params)
    assert all(map(valid, rated)) and len({one.text for one in rated}) == 3
    assert beside.token_ids == free.token_ids


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (
            StructuredOutputs(json=json.dumps(RATING)),
            lambda text: jsonschema.validate(json.loads(text), RATING) is None,
        ),
        (
            StructuredOutputs(regex=r"(19|20)[0-9]{2}-[a-f]{2,4}(é|ß)?"),
            re.compile(r"(19|20)[0-9]{2}-[a-f]{2,4}(é|ß)?").fullmatch,
        ),
        (StructuredOutputs(choice=["yes", 'no "maybe"', "über"]), {"yes", 'no "maybe"', "über"}.__contains__),
        (
            StructuredOutputs(grammar='start: "<" (A | B) ">"\nA: /a+/\nB: /[0-9]{3}/'),
            re.compile(r"<(a+|[0-9]{3})>").fullmatch,
        ),
    ],
    ids=["json text", "regex", "choice", "grammar"],
)
def test_each_kind_of_structured_output_is_matched_as_a_whole(model, tokenizer, wanted, matches):
    params = [replace(RATED, seed=seed, structured_outputs=wanted) for seed in range(4)]
    completions = engine_of(model, tokenizer).generate([[50]] * 4, params)
    assert all(matches(one.text) and one.finish_reason == "stop" for one in completions)


def test_json_object_gives_an_object(model, tokenizer):
    closing = {tokenizer.encode("}")[0]: 8.0}  # else a random model opens objects without end
    params = replace(RATED, structured_outputs=StructuredOutputs(json_object=True), logit_bias=closing)
    completion = engine_of(model, tokenizer).generate([[50]], params)[0]
    assert completion.finish_reason == "stop" and isinstance(json.loads(completion.text), dict)


def test_greedy_and_penalized_requests_are_constrained_too(model, tokenizer):
    greedy = replace(RATED, temperature=0.0, repetition_penalty=1.1, logit_bias={40: 50.0})
    assert valid(engine_of(model, tokenizer).generate([[50]], greedy)[0])


def test_each_of_n_choices_has_a_matcher_of_its_own(model, tokenizer):
    completions = engine_of(model, tokenizer).generate([[50, 51]], replace(RATED, n=4))
    assert all(map(valid, completions)) and len({one.text for one in completions}) > 2


def test_a_preempted_request_goes_on_in_its_grammar(model, tokenizer):
    wanted = engine_of(model, tokenizer).generate([[50, 51]], RATED)[0]
    engine = engine_of(model, tokenizer)
    request, count = engine.add([50, 51], RATED), 0
    while not request.finished:
        engine.step()
        count += 1
        if count % 3 == 0 and not request.finished:
            engine.scheduler.preempt(request)
    assert engine.scheduler.num_preemptions > 3 and valid(request.completion())
    assert request.completion().token_ids == wanted.token_ids


def test_deterministic_mode_gives_the_same_bits_alone_and_in_a_batch(model, tokenizer):
    engine = engine_of(model, tokenizer, deterministic=True)
    params = [replace(RATED, seed=seed, logprobs=True) for seed in range(3)]
    alone = [engine.generate([[50, 51]], one)[0] for one in params]
    together = engine.generate([[50, 51]] * 4, [*params, FREE])[:3]
    assert together == alone and all(map(valid, alone))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_drafts_change_no_constrained_answer(model, tokenizer, seed):
    """Half of the drafts are rejected: a matcher that consumed a rejected token would give another answer."""
    params = [replace(RATED, seed=seed), replace(RATED, seed=seed + 10), replace(FREE, seed=seed)]
    wanted = engine_of(model, tokenizer).generate([[50]] * 3, params)
    engine = engine_of(model, tokenizer, num_speculative_tokens=6)

    def propose(request, limit):
        written = len(request.tokens)
        right = wanted[request.id].token_ids[written : written + written % 5]
        return [*right, 70, 71][: min(limit, 6)]

    engine.scheduler.propose = propose
    found = engine.generate([[50]] * 3, params)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert (
        all(map(valid, found[:2]))
        and engine.proposer.num_draft_tokens - 20 > engine.proposer.num_accepted_tokens > 20
    )


@pytest.mark.parametrize("budget", [0, 5])
def test_the_grammar_applies_after_the_thinking_trace(model, tokenizer, budget):
    prompt = tokenizer.encode("Assistant\n<think>\n")
    params = replace(RATED, thinking_budget=budget, thinking_grace=0, n=3)
    for completion in engine_of(model, tokenizer).generate([prompt], params):
        assert valid(completion) and (completion.thinking_tokens > 0) == (budget != 0)


def test_an_answer_that_begins_within_the_token_that_ends_the_trace_is_continued():
    """One token spells the end of `</think>`, white space and the first brace of the answer."""
    letters = {letter: i for i, letter in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [(">", "Ċ"), (">Ċ", "Ċ"), (">ĊĊ", "{")]
    vocabulary = letters | {"".join(pair): len(letters) + i for i, pair in enumerate(merges)}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.add_special_tokens([AddedToken("</s>", special=True)])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer, size, stop_ids = Tokenizer(raw), len(vocabulary), frozenset({0})
    grammar = GrammarCompiler(tokenizer, size, stop_ids).compile(RATED.structured_outputs)
    prompt = tokenizer.encode("<think>\n")
    request = Request(0, prompt, RATED, tokenizer, seed=0, stop_ids=stop_ids, grammar=grammar)
    trace = tokenizer.encode("so</think>\n\n{")
    assert tokenizer.token_bytes(trace[-1]) == b">\n\n{"
    for token in trace:
        allowed_V = request.allowed_tokens(size)
        assert allowed_V.sum() == size - 1 and not allowed_V[0]
        request.accept(token)
    allowed_V = request.allowed_tokens(size)
    assert set(allowed_V.nonzero()[0]) == set(tokenizer.encode('"'))


def test_the_trace_may_not_end_the_text_that_the_answer_must_follow(model, tokenizer):
    eos = {tokenizer.eos_id: 100.0}
    prompt = tokenizer.encode("Assistant\n<think>\n")
    params = replace(RATED, temperature=0.0, logit_bias=eos, thinking_budget=20, thinking_grace=0)
    engine = engine_of(model, tokenizer)
    assert engine.generate([prompt], replace(params, structured_outputs=None))[0].thinking_end == "none"
    completion = engine.generate([prompt], params)[0]
    assert valid(completion) and completion.thinking_tokens == 20


def test_a_prompt_from_the_prefix_cache_is_constrained(model, tokenizer):
    engine = engine_of(model, tokenizer, prefix_cache_bytes=2**22, prefix_cache_interval=128)
    prompt = list(range(20, 200))
    first, second = (engine.generate([prompt], RATED)[0] for _ in range(2))
    assert second.cached_tokens == 128 and valid(second) and second.token_ids == first.token_ids


def test_excluded_tokens_have_no_probability(model, tokenizer):
    choice = StructuredOutputs(choice=["ab", "cd"])
    params = replace(RATED, structured_outputs=choice, logprobs=True, top_logprobs=5)
    completion = engine_of(model, tokenizer).generate([[50]], params)[0]
    first = dict(completion.top_logprobs[0])
    allowed = {tokenizer.encode("a")[0], tokenizer.encode("c")[0]}
    assert {token for token, logprob in first.items() if logprob > float("-inf")} == allowed


def test_a_grammar_that_exceeds_its_limits_fails_its_own_request(model, tokenizer):
    large = replace(RATED, structured_outputs=StructuredOutputs(regex="(a{1000}){1000}"))
    engine = engine_of(model, tokenizer)
    requests = [engine.add([50], large), engine.add([50], RATED)]
    while engine.busy:
        engine.step()
    failed, fine = (request.completion() for request in requests)
    assert failed.finish_reason == "error" and failed.error.code == "grammar_too_complex" and valid(fine)
    assert engine.scheduler.slots.num_used == engine.scheduler.pages.num_used == 0
    with pytest.raises(NanohybridError, match="the grammar exceeds its limits"):
        engine.generate([[50]], large)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "json_object": True}, "given: json_object and regex"),
        ({"json": [1]}, "not a JSON object|not JSON"),
        ({"json": "[1]"}, "not a JSON object"),
        ({"json": "{"}, "not JSON"),
        ({"choice": []}, "choice is"),
        ({"choice": ["a", ""]}, "choice is"),
    ],
)
def test_structured_outputs_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        StructuredOutputs(**fields)


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutputs(json={"type": "nonsense"}),
        StructuredOutputs(json={"type": "integer", "minimum": 5, "maximum": 1}),
        StructuredOutputs(regex="(?=a)b"),
        StructuredOutputs(regex="\ud800"),
        StructuredOutputs(grammar="start: nowhere"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_in_one_line(model, tokenizer, wanted):
    engine = engine_of(model, tokenizer)
    with pytest.raises(InputError, match="the grammar cannot be") as refused:
        engine.add([50], replace(RATED, structured_outputs=wanted))
    assert "\n" not in str(refused.value) and not engine.busy


def test_ignore_eos_contradicts_structured_outputs():
    with pytest.raises(InputError, match="ignore_eos contradicts structured_outputs"):
        replace(RATED, ignore_eos=True)


def test_a_missing_llguidance_is_named_with_its_extra(model, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"llguidance: pip install 'nanohybrid\[serve\]'"):
        engine_of(model, tokenizer).add([50], RATED)


def test_equal_structured_outputs_are_compiled_once(tokenizer):
    compiler = GrammarCompiler(tokenizer, 269, frozenset(tokenizer.stop_ids))
    first, second = (compiler.compile(StructuredOutputs(json=RATING)) for _ in range(2))
    assert first is second
    assert compiler.compile(StructuredOutputs(regex="a")) is not first


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["é", 3]},
            {"type": "integer", "minimum": 0, "maximum": 9},
        ]
    ),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", 'q"']), inner, min_size=1).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties),
                "additionalProperties": False,
            }
        ),
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
    ),
    max_leaves=4,
)


@settings(max_examples=20, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 5))
def test_answers_are_valid_under_schemas_of_many_shapes(model, tokenizer, schema, seed):
    params = replace(RATED, seed=seed, max_tokens=300, structured_outputs=StructuredOutputs(json=schema))
    assert valid(engine_of(model, tokenizer).generate([[50]], params)[0], schema)
