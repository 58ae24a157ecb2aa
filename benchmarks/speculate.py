"""What drafts gain: tokens a second with and without, on texts that repeat themselves and on texts that do
not.

    python benchmarks/speculate.py runs/quickstart/4-compress --num-speculative-tokens 7
    python benchmarks/speculate.py --preset nano-291m --new-tokens 48 --num-speculative-tokens 7

Greedy, one request at a time, on the task prompts of the quickstart and on a list that a model goes on
copying. A preset has random weights, which repeat nothing: its answer is held to three tokens by a bias,
which is the text of a perfect copier with the cost of the real architecture. Prints a line for each text;
both runs must say the same."""

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from nanohybrid.engine import LLM, SamplingParams
from nanohybrid.presets import preset
from nanohybrid.tasks import registry


def texts(llm: LLM, kinds: list[str]) -> dict[str, list[int]]:
    rng = random.Random(0)
    found = {
        name: llm.encode_chat(
            [{"role": "user", "content": registry.get(name).make(rng, 4, "test").prompt}], True
        )
        for name in kinds
    }
    found["a list, copied"] = llm.encode("the numbers are 3 1 4 1 5 9 2 6 5 3 5 8, and again: " * 12)
    return found


def tokens_per_second(
    llm: LLM, prompt: list[int], params: SamplingParams, speculate: int
) -> tuple[float, list[int], str]:
    llm.engine_config = replace(llm.engine_config, num_speculative_tokens=speculate)
    engine = llm.engine([prompt], params.max_tokens)
    request, steps = engine.add(prompt, params), 0
    engine.step()  # the prompt
    began = time.perf_counter()
    while not request.finished:
        engine.step()
        steps += 1
    rate = (len(request.tokens) - 1) / (time.perf_counter() - began)
    proposer = engine.proposer
    said = (
        f"{steps} steps, {proposer.num_accepted_tokens} of {proposer.num_draft_tokens} drafts accepted"
        if proposer
        else f"{steps} steps"
    )
    return rate, request.tokens, said


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--preset")
    parser.add_argument("--num-speculative-tokens", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--tasks", nargs="*", default=["sums", "swaps", "running"])
    arguments = parser.parse_args()
    if arguments.preset:
        llm = LLM.random(preset(arguments.preset), torch.float32)
        chosen = {"a bias to three tokens": llm.encode("a text " * 8)}
        params = SamplingParams(
            max_tokens=arguments.new_tokens, ignore_eos=True, logit_bias={300: 100.0, 301: 100.0, 302: 100.0}
        )
    else:
        llm = LLM(arguments.path, torch.float32)
        chosen = texts(llm, arguments.tasks)
        params = SamplingParams(max_tokens=arguments.new_tokens, ignore_eos=True)
    for name, prompt in chosen.items():
        tokens_per_second(llm, prompt, params, 0)  # warm
        plain, wanted, _ = tokens_per_second(llm, prompt, params, 0)
        sooner, got, said = tokens_per_second(llm, prompt, params, arguments.num_speculative_tokens)
        same = "the same text" if got == wanted else "ANOTHER TEXT"
        print(
            f"{name}: {plain:.1f} -> {sooner:.1f} tokens/s, {sooner / plain:.2f} times ({said}); {same}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
