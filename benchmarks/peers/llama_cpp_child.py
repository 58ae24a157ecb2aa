"""llama.cpp through llama-cpp-python's bindings of its C functions, as its own llama-bench measures: per
token, Python only selects the top-1 token.

python benchmarks/peers/llama_cpp_child.py FILE.gguf --threads 2
"""

import json
import time

import llama_cpp
import numpy as np
from child import CHECK_TOKENS, arguments, figures, prompt_lengths, prompts


class Model:
    """A model and a context for `batch` sequences of `length` tokens each."""

    def __init__(self, path: str, batch: int, length: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = batch * (length + 256), batch, max(length, 512)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit("llama.cpp created no context; is there enough memory?")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(length, batch), 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute the tokens, each as (token, position, sequence, whether its logits are wanted)."""
        self.batch.n_tokens = len(tokens)
        for index, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[index], self.batch.pos[index], self.batch.logits[index] = token, position, wanted
            self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, sequence
        code = llama_cpp.llama_decode(self.context, self.batch)
        if code:
            raise SystemExit(f"llama_decode: {code}")

    def prefill(self, prompt: list[int], sequence: int) -> int:
        """Compute a prompt; the top-1 next id."""
        self.decode(
            [(token, place, sequence, place == len(prompt) - 1) for place, token in enumerate(prompt)]
        )
        return int(self.logits(len(prompt) - 1).argmax())

    def logits(self, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(self.context, index), shape=(self.vocabulary,)
        )


def main() -> None:
    given = arguments("a GGUF file")
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    versions = {
        "llama-cpp-python": llama_cpp.__version__,
        "built for": llama_cpp.llama_print_system_info().decode().strip(" |"),
    }
    if given.logits:
        model = Model(given.model, 1, CHECK_TOKENS, given.threads)
        model.prefill(prompts(model.vocabulary, 1, CHECK_TOKENS)[0], 0)
        np.save(given.logits, model.logits(CHECK_TOKENS - 1))
        print(json.dumps({"versions": versions}))
        return
    model = Model(given.model, given.batch, given.prompt_tokens + given.new_tokens, given.threads)
    texts = prompts(model.vocabulary, given.batch, given.prompt_tokens)
    prefill, decode = [], []
    for repetition, length in enumerate(prompt_lengths(given)):
        model.clear()
        times = [time.perf_counter()]
        ids = [model.prefill(text[:length], sequence) for sequence, text in enumerate(texts)]
        times.append(time.perf_counter())
        for step in range(given.new_tokens):
            model.decode([(number, length + step, sequence, True) for sequence, number in enumerate(ids)])
            ids = [int(model.logits(sequence).argmax()) for sequence in range(given.batch)]
        times.append(time.perf_counter())
        if repetition:  # the first one is the warm-up
            prefill.append(given.batch * given.prompt_tokens / (times[1] - times[0]))
            decode.append(given.batch * given.new_tokens / (times[2] - times[1]))
    print(json.dumps(figures(prefill, decode, versions)))


if __name__ == "__main__":
    main()
