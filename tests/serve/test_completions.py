import pytest
import torch
from serving import sse

ASK = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


def complete(serve, **more):
    return serve.http.post("/v1/completions", json={**ASK, **more}).json()


def ids_of(serve, text):
    return serve.http.post("/tokenize", json={"prompt": text}).json()["tokens"]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_completions_echo_has_the_logprobs_of_a_plain_forward(serve, max_tokens):
    text = "to be or not"
    ids = ids_of(serve, text)
    with torch.no_grad():
        wanted = serve.service.llm.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    answer = complete(serve, prompt=text, echo=True, logprobs=2, max_tokens=max_tokens)
    choice, given = answer["choices"][0], answer["choices"][0]["logprobs"]
    assert choice["text"].startswith(text) and answer["usage"]["completion_tokens"] == max_tokens
    assert (
        len(given["tokens"])
        == len(given["token_logprobs"])
        == len(given["top_logprobs"])
        == len(ids) + max_tokens
    )
    assert given["token_logprobs"][0] is None and given["top_logprobs"][0] is None
    for at in range(1, len(ids)):
        assert given["token_logprobs"][at] == pytest.approx(wanted[at - 1, ids[at]].item(), abs=1e-4)
        assert max(given["top_logprobs"][at].values()) == pytest.approx(wanted[at - 1].max().item(), abs=1e-4)
    greedy = complete(serve, prompt=text, logprobs=2)["choices"][0]
    assert given["tokens"][len(ids) :] == greedy["logprobs"]["tokens"][:max_tokens]
    starts = [0]
    for name in given["tokens"]:
        starts.append(starts[-1] + len(name))
    assert given["text_offset"] == starts[:-1]


def test_completions_echo_of_a_greedy_continuation_has_top_tokens(serve):
    """As lm-eval checks it: the best alternative at each position is the token itself."""
    ids = ids_of(serve, "once")
    continuation = complete(serve, prompt=ids, logprobs=1, max_tokens=12)["choices"][0]["logprobs"][
        "token_logprobs"
    ]
    model = serve.service.llm.model
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    given = complete(serve, prompt=ids, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    tail = list(zip(given["token_logprobs"], given["top_logprobs"], strict=True))[-13:-1]
    assert all(value == max(top.values()) for value, top in tail)
    assert [value for value, _ in tail] == pytest.approx(continuation, abs=1e-4)


def test_completions_batch_equals_each_prompt_alone(serve):
    prompts = [ids_of(serve, text) for text in ("one", "three and more", "x")]
    together = complete(serve, prompt=prompts, echo=True, logprobs=1, n=2, temperature=1.0, seed=4)
    for at, prompt in enumerate(prompts):
        alone = complete(serve, prompt=prompt, echo=True, logprobs=1, n=2, temperature=1.0, seed=4)
        for choice in (0, 1):
            one, other = together["choices"][2 * at + choice], alone["choices"][choice]
            assert one["text"] == other["text"] and one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
            assert one["logprobs"]["token_logprobs"][1:] == pytest.approx(
                other["logprobs"]["token_logprobs"][1:], abs=1e-4
            )
    assert together["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_completions_streamed_echo_adds_up_to_the_whole(serve):
    ask = {"prompt": "grüße", "echo": True, "logprobs": 1, "max_tokens": 6}
    whole = complete(serve, **ask)["choices"][0]
    chunks = [
        c["choices"][0] for c in sse(serve.http.post("/v1/completions", json={**ASK, **ask, "stream": True}))
    ]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for key in ("tokens", "text_offset"):
        assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][key]] == whole[
            "logprobs"
        ][key]


def test_completions_more_prompts_than_the_queue_holds_are_refused(serve):
    answer = serve.http.post("/v1/completions", json={**ASK, "prompt": ["a"] * 13})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
