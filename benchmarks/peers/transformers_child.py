"""transformers' `generate`, greedy, in bf16.

python benchmarks/peers/transformers_child.py DIR --threads 2
"""

import json
import time

import numpy as np
import torch
import transformers
from child import CHECK_TOKENS, arguments, figures, prompt_lengths, prompts

VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__}


class Clock(transformers.LogitsProcessor):
    """Records the time at which each step's logits are ready."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def opened(path: str) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (
                0.0,
                float("inf"),
            )  # transformers 5.23 clamps in prefill regardless of the configuration
    return model


@torch.inference_mode()
def main() -> None:
    given = arguments("a checkpoint directory")
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = opened(given.model)
    if given.logits:
        ids = torch.tensor(prompts(model.config.vocab_size, 1, CHECK_TOKENS))
        np.save(given.logits, model(ids).logits[0, -1].float().numpy())
        print(json.dumps({"versions": VERSIONS}))
        return
    ids = torch.tensor(prompts(model.config.vocab_size, given.batch, given.prompt_tokens))
    steps = given.new_tokens + 1  # the first token comes from the prompt
    prefill, decode = [], []
    for repetition, length in enumerate(prompt_lengths(given)):
        clock, read = Clock(), ids[:, :length]
        begin = time.perf_counter()
        model.generate(
            read, attention_mask=torch.ones_like(read), do_sample=False, min_new_tokens=steps,
            max_new_tokens=steps, eos_token_id=None, pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList([clock]),
        )  # fmt: skip
        if repetition:  # the first one is the warm-up
            prefill.append(given.batch * given.prompt_tokens / (clock.times[0] - begin))
            decode.append(given.batch * given.new_tokens / (clock.times[-1] - clock.times[0]))
    print(json.dumps(figures(prefill, decode, VERSIONS)))


if __name__ == "__main__":
    main()
