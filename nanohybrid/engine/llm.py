"""A model with its tokenizer and its chat template: the offline interface over `Engine`.

    llm = LLM("runs/quickstart/4-compress")
    llm.chat([{"role": "user", "content": "What is 3 + 4 * 2?"}]).text
    llm.generate(["Once upon a time"], SamplingParams(max_tokens=64, temperature=0.8))

Prompts are texts, conversations, or ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.engine.config import EngineConfig
from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import Completion, SamplingParams
from nanohybrid.engine.random_weights import random_model, stand_in_tokenizer
from nanohybrid.engine.thinking import closes, opens, prompt_tail
from nanohybrid.executors.cpu.weights import prepare
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, Tokenizer

Message = dict[str, Any]


class LLM:
    """A model, its tokenizer and its chat template.

    path: a checkpoint directory, or an id of the Hub. dtype: of the weights, also by name ("bf16"); None
        keeps the checkpoint's own. quantize: int8, int4 or fp8, for the matrices, which are quantized one by
        one as they are read.
    engine_config, or its fields by name as `options` (`LLM(path, max_num_seqs=8)`): how the engines are set
        up that answer.

    Raises CheckpointError where the checkpoint cannot be read, and InputError for an option that does not
    exist or cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        *,
        quantize: str | None = None,
        engine_config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        from nanohybrid.checkpoint import load, resolve  # here, since random models need none of it

        config, directory = EngineConfig.of(engine_config, options), resolve(path)
        model = load(directory, dtype=dtype, device=device, quantize=quantize)
        self._set(model, Tokenizer.from_directory(directory), directory, config)

    @classmethod
    def random(
        cls,
        config: HybridConfig,
        dtype: torch.dtype,
        seed: int = 0,
        device: str = "cpu",
        *,
        quantize: str | None = None,
        engine_config: EngineConfig | None = None,
        **options: Any,
    ) -> "LLM":
        """A model of random weights, to measure speed and memory with: its text means nothing."""
        engine_config = EngineConfig.of(engine_config, options)
        model = random_model(config, dtype, seed, device, quantize)
        return cls.from_model(model, stand_in_tokenizer(config), engine_config=engine_config)

    @classmethod
    def from_model(
        cls,
        model: HybridLM,
        tokenizer: Tokenizer,
        directory: Path | None = None,
        *,
        engine_config: EngineConfig | None = None,
        **options: Any,
    ) -> "LLM":
        """A model that is in memory already. directory: where its chat template is.

        None: the default template.
        """
        llm = cls.__new__(cls)
        llm._set(model, tokenizer, directory, EngineConfig.of(engine_config, options))
        return llm

    def _set(
        self, model: HybridLM, tokenizer: Tokenizer, directory: Path | None, engine_config: EngineConfig
    ) -> None:
        prepare(model)
        self.model, self.tokenizer, self.directory = model, tokenizer, directory
        self.engine_config = engine_config

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the checkpoint, or the default one."""
        return (
            ChatTemplate.default() if self.directory is None else ChatTemplate.from_directory(self.directory)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, after the BOS token where the tokenizer of the model begins a text with it.

        Special tokens in the text are parsed.
        """
        return self.tokenizer.encode(text, bos=self.tokenizer.begins_with_bos)

    def encode_chat(self, messages: Sequence[Message], thinking: bool | None = None) -> list[int]:
        """Ids of a conversation up to where the answer begins.

        Special tokens inside messages are encoded as plain text.
        """
        return self.template.encode(self.tokenizer, messages, thinking=thinking)

    def opens_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether the answer to this prompt begins inside a thinking trace."""
        return opens(prompt_tail(self.tokenizer, prompt))

    def may_think(self, prompt: Sequence[int]) -> bool:
        """Whether the answer to this conversation may open a thinking trace itself."""
        tail = prompt_tail(self.tokenizer, prompt)
        return self.template.model_opens_thinking and not opens(tail) and not closes(tail)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], object] | None = None,
    ) -> list[Completion]:
        """Complete prompts (texts or ids): `n` completions of each, in the order of the prompts.

        Runs in an engine that holds no more memory than the job needs. The other arguments and the errors are
        those of `Engine.generate`.
        """
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        each = [params] if isinstance(params, SamplingParams) else params
        max_tokens = max((one.max_tokens for one in each), default=1)
        n = max((one.n for one in each), default=1)
        return self.engine(ids, max_tokens, n).generate(ids, params, progress)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, thinking: bool | None = None
    ) -> Completion:
        """Answer a conversation. thinking: on, off, or None: as the messages and the template say.

        `text` of the result contains the thinking trace; `nanohybrid.text.split_thinking` separates the two.
        """
        prompt = self.encode_chat(messages, thinking)
        params = replace(params or SamplingParams(), may_think=self.may_think(prompt))
        return self.generate([prompt], params)[0]

    def engine(self, prompts: Sequence[Sequence[int]], max_tokens: int, n: int = 1) -> Engine:
        """An engine with as much memory as this job needs (`Engine.sized_for`)."""
        return Engine.sized_for(self.model, self.tokenizer, prompts, max_tokens, self.engine_config, n)
