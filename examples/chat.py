"""Chat with a checkpoint from Python: a conversation, a thinking budget, streaming.

python examples/chat.py runs/quickstart/4-compress "parity 1101"
python examples/chat.py   # no checkpoint: random weights, which show the calls and speak nonsense
"""

import sys

import torch

import nanohybrid
from nanohybrid import LLM, SamplingParams
from nanohybrid.text import split_thinking


def open_model(path: str | None) -> LLM:
    if path is not None:
        return LLM(path)  # dtype, device and quantize="int8" | "int4" are further arguments
    return LLM.random(nanohybrid.preset("tiny"), torch.float32)


def main() -> None:
    llm = open_model(sys.argv[1] if len(sys.argv) > 1 else None)
    question = sys.argv[2] if len(sys.argv) > 2 else "What is 3 + 4 * 2?"
    messages = [{"role": "user", "content": question}]

    # one answer; thinking_budget is how many tokens the model may think before it must answer
    params = SamplingParams(max_tokens=64, temperature=0.0, thinking_budget=32)
    completion = llm.chat(messages, params, thinking=True)
    thought, answer = split_thinking(completion.text)
    print("thought:", (thought or "").strip()[:200])
    print("answer: ", answer.strip()[:200])
    print(f"{len(completion.token_ids)} tokens, finished by {completion.finish_reason}")

    # the same conversation goes on, without thinking, streamed piece by piece
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And doubled?"}]
    prompt = llm.encode_chat(messages, thinking=False)
    for text in llm.engine([prompt], 32).stream(prompt, SamplingParams(max_tokens=32)):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
