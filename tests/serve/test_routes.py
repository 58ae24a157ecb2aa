import pytest
from serving import sse

ASK = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


def test_chat_stream_adds_up_to_the_whole_answer(serve):
    ask = {**ASK, "thinking_budget": 6, "thinking_grace": 2}
    whole = serve.chat(**ask).json()
    chunks = sse(serve.chat(**ask, stream=True, stream_options={"include_usage": True}))
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    message = whole["choices"][0]["message"]
    assert "".join(d.get("content") or "" for d in deltas) == message["content"]
    assert "".join(d.get("reasoning_content") or "" for d in deltas) == (message["reasoning_content"] or "")
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["nanohybrid"] == whole["nanohybrid"]
    assert (
        [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1]
        == whole["choices"][0]["finish_reason"]
        == "length"
    )
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 8
    assert whole["nanohybrid"]["thinking_end"] in ("natural", "newline", "forced")


def test_chat_last_chunk_without_usage_has_thinking_end(serve):
    chunks = sse(serve.chat(**ASK, stream=True))
    assert "nanohybrid" in chunks[-1] and all("nanohybrid" not in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize(
    "switch",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {"messages": [{"role": "system", "content": "/no_think"}, {"role": "user", "content": "hi"}]},
    ],
)
def test_chat_thinking_can_be_turned_off(serve, switch):
    answer = serve.chat(**{**ASK, **switch}).json()
    assert answer["choices"][0]["message"]["reasoning_content"] is None
    assert (
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
        and answer["nanohybrid"]["thinking_end"] == "none"
    )


def test_chat_reasoning_effort_is_a_budget_and_a_number_overrides_it(serve):
    one = serve.chat(**{**ASK, "max_tokens": 300}, reasoning_effort="minimal", thinking_grace=0).json()
    assert one["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 128
    two = serve.chat(**ASK, reasoning_effort="high", max_thinking_tokens=0).json()
    assert two["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_chat_n_choices_differ_and_the_first_equals_that_of_n_1(serve):
    ask = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    three = serve.chat(**ask, n=3).json()["choices"]
    texts = [(c["message"]["content"], c["message"]["reasoning_content"]) for c in three]
    one = serve.chat(**ask).json()["choices"][0]["message"]
    assert [c["index"] for c in three] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == (one["content"], one["reasoning_content"])
    streamed = sse(serve.chat(**ask, n=3, stream=True))
    for index, text in enumerate(texts):
        deltas = [c["delta"] for chunk in streamed for c in chunk["choices"] if c["index"] == index]
        assert "".join(d.get("reasoning_content") or "" for d in deltas) == (text[1] or "")


def test_chat_logprobs_of_every_token(serve):
    answer = serve.chat(**ASK, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    streamed = sse(serve.chat(**ASK, logprobs=True, stream=True))
    parts = [c["logprobs"]["content"] for chunk in streamed for c in chunk["choices"] if c["logprobs"]]
    assert len(answer) == 24 and [round(t["logprob"], 3) for t in answer] == [
        round(t["logprob"], 3) for part in parts for t in part
    ]
    assert all(
        bytes(t["bytes"]).decode("utf-8", "replace") == t["token"] and t["logprob"] <= 0 for t in answer
    )


def test_completions_accept_texts_ids_and_lists(serve):
    def complete(**more):
        return serve.http.post("/v1/completions", json={**ASK, **more}).json()

    ids = serve.http.post("/tokenize", json={"prompt": "ab"}).json()["tokens"]
    one, same = complete(prompt="ab", logprobs=1), complete(prompt=ids)
    both = complete(prompt=["ab", "xyz"])
    assert one["choices"][0]["text"] == same["choices"][0]["text"] == both["choices"][0]["text"]
    assert len(both["choices"]) == 2 and both["usage"]["completion_tokens"] == 48
    logprobs = one["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 24
    chunks = sse(serve.http.post("/v1/completions", json={**ASK, "prompt": "ab", "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks) == one["choices"][0]["text"]


def test_detokenize_returns_the_tokenized_text(serve):
    answer = serve.http.post("/tokenize", json={"prompt": "grüß", "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"]) == 6
    assert serve.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "grüß"}
    chat = serve.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()[
        "tokens"
    ]
    shown = serve.http.post("/detokenize", json={"tokens": chat}).json()["prompt"]
    assert shown == "<SPECIAL_10>System\n\n<SPECIAL_11>User\nhi\n<SPECIAL_11>Assistant\n<think>\n"


def test_chat_tools_are_in_the_prompt_unless_tool_choice_is_none(serve):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    sizes = {
        choice: serve.chat(max_tokens=1, tools=[tool], tool_choice=choice).json()["usage"]["prompt_tokens"]
        for choice in ("auto", "none")
    }
    assert sizes["auto"] > sizes["none"] + 20


def test_chat_tool_call_of_the_model_is_returned(serve, monkeypatch):
    call = '<TOOLCALL>[{"name": "add", "arguments": {"a": 2}}]</TOOLCALL>'
    tokenizer = serve.service.llm.tokenizer
    ids = tokenizer.encode(call)
    tool = {"type": "function", "function": {"name": "add"}}
    add = serve.service.loop.engine.add_choices

    def forced(prompt, params, **more):
        requests = add(prompt, params, **more)
        for request in requests:
            request.forced.extend([*ids, tokenizer.eos_id])
        return requests

    monkeypatch.setattr(serve.service.loop.engine, "add_choices", forced)
    ask = {"tools": [tool], "max_tokens": 200, "chat_template_kwargs": {"enable_thinking": False}}
    choice = serve.chat(**ask).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2}'}
    deltas = [c["delta"] for chunk in sse(serve.chat(**ask, stream=True)) for c in chunk["choices"]]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert pieces[0]["id"] and pieces[0]["function"]["name"] == "add" and len(pieces) > 3
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"a": 2}'


def test_metrics_count_requests_and_tokens(serve):
    before = serve.metric('thinking_ends_total{end="forced"}')
    serve.chat(max_tokens=30, thinking_budget=0)
    assert (
        serve.metric('thinking_ends_total{end="forced"}') + serve.metric('thinking_ends_total{end="newline"}')
        > before
    )
    assert serve.metric("requests_running") == serve.metric("requests_waiting") == 0
    assert serve.metric("slots_free") == 4 and serve.metric("pages_free") == serve.metric("pages_total") == 32
    assert (
        serve.metric("time_to_first_token_seconds_count") > 0
        and serve.metric("time_per_token_seconds_count") > 0
    )


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_page_has_no_external_links(serve, path):
    page = serve.http.get(path)
    assert (
        page.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert "http://" not in page.text and "https://" not in page.text and "src=" not in page.text


def test_models_route_and_readiness(serve):
    assert [model["id"] for model in serve.http.get("/v1/models").json()["data"]] == ["tiny"]
    assert serve.http.get("/health").status_code == serve.http.get("/ready").status_code == 200


def test_official_client_works(serve):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{serve.url}/v1", api_key="none", max_retries=0)
    ask = dict(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**ask)
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ask, "max_tokens": -1})
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ask, "model": "gpt-17"})


def test_chat_sampling_fields_reach_the_engine(serve):
    top = serve.chat(**ASK, logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert all(len(t["top_logprobs"]) == 3 and t["top_logprobs"][0]["logprob"] >= t["logprob"] for t in top)
    text = serve.http.post("/v1/completions", json={**ASK, "prompt": "a", "logit_bias": {"100": 100}}).json()[
        "choices"
    ][0]["text"]
    assert len(set(text)) == 1
    one, two = (
        serve.http.post("/v1/completions", json={**ASK, "prompt": "a", "frequency_penalty": p}).json()
        for p in (0, 2)
    )
    assert one["choices"][0]["text"] != two["choices"][0]["text"]


def respond(serve, **more):
    return serve.http.post(
        "/v1/responses",
        json={"max_output_tokens": 40, "temperature": 0, "thinking_budget": 6, "thinking_grace": 0, **more},
    )


def test_responses_equal_the_chat_answer(serve):
    answer = respond(serve, input="hi", instructions="be brief").json()
    chat = serve.chat(
        max_tokens=40, temperature=0, thinking_budget=6, thinking_grace=0,
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    ).json()  # fmt: skip
    items = {item["type"]: item for item in answer["output"]}
    assert items["reasoning"]["content"][0]["text"] == chat["choices"][0]["message"]["reasoning_content"]
    assert items["message"]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    cut = respond(serve, input="hi", max_output_tokens=4).json()
    assert cut["status"] == "incomplete" and cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert respond(serve, input=[]).status_code == 400 and respond(serve).json()["error"]["param"] == "input"
    assert (
        respond(serve, input="hi", previous_response_id="resp_1").json()["error"]["param"]
        == "previous_response_id"
    )


def test_official_client_reads_a_streamed_response_with_a_tool_call(serve, monkeypatch):
    openai = pytest.importorskip("openai")
    tokenizer, engine = serve.service.llm.tokenizer, serve.service.loop.engine
    add = engine.add_choices
    call = '</think>\n\nso <TOOLCALL>[{"name": "add", "arguments": {"a": 2}}]</TOOLCALL>'

    def forced(prompt, params, **more):
        requests = add(prompt, params, **more)
        requests[0].forced.extend([*tokenizer.encode("let me" + call), tokenizer.eos_id])
        return requests

    monkeypatch.setattr(engine, "add_choices", forced)
    client = openai.OpenAI(base_url=f"{serve.url}/v1", api_key="none", max_retries=0)
    history = [
        {"role": "user", "content": "add"},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "0"},
    ]
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
    stream = client.responses.create(
        model="tiny", input=history, tools=[tool], max_output_tokens=200, stream=True
    )
    events = list(stream)
    final = events[-1].response
    assert events[-1].type == "response.completed" and [e.sequence_number for e in events] == list(
        range(len(events))
    )
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "so" and (final.output[2].name, final.output[2].arguments) == (
        "add",
        '{"a": 2}',
    )
    deltas = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert deltas == '{"a": 2}'


def test_chat_next_turn_and_other_question_hit_the_prefix_cache():
    from serving import started

    with started(prefix_cache_bytes=1 << 26) as serve:

        def ask(*turns, **more):
            roles = ["system", "user", "assistant", "user"]
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
            answer = serve.chat(
                **{"max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}, messages=messages
            ).json()
            return (
                answer["usage"]["prompt_tokens_details"]["cached_tokens"],
                answer["nanohybrid"]["cache_miss"],
                answer["choices"][0]["message"],
            )

        system = "You are brief. " * 8
        assert ask(system, "first question")[:2] == (0, "no checkpoint")
        turn = ask(system, "first question", "an answer", "second question")
        assert turn[0] > len(system) + len("first question") and turn[1] is None
        assert len(system) < ask(system, "another")[0] < turn[0]
        assert ask(system, "another", cache_salt="mine")[0] == 0
        serve.service.loop.engine.prefix_cache = None
        serve.service.loop.engine.scheduler.on_admit = None
        assert ask(system, "first question", "an answer", "second question")[2] == turn[2]
