"""Models with random weights in the full size of a configuration, made quickly.

They serve to measure speed and memory without a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.errors import MissingExtraError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.free_memory import check_memory
from nanohybrid.model import HybridLM
from nanohybrid.model.initialize import fill
from nanohybrid.model.quantized import check_format, quantized_linear, quantized_names, replace
from nanohybrid.text import Tokenizer, tekken
from nanohybrid.text.bytelevel import assemble, to_characters

LARGE = 1 << 22  # a parameter with more elements than this repeats one block of random numbers
TEKKEN = 131_072  # ids of the official vocabulary
BLOCK = 1_048_573  # numbers in that block: a prime, so that no two rows of a matrix are equal


def random_model(
    config: HybridConfig, dtype: torch.dtype, seed: int = 0, device: str = "cpu", quantize: str | None = None
) -> HybridLM:
    """A model with the weights of `random_weights`, in no more memory than they take.

    quantize: int8, int4 or fp8, for the matrices; each is quantized as it is made, some rows at a time.

    Raises InputError where the weights do not fit in memory.
    """
    if quantize is not None:
        check_format(quantize)
    check_memory(config, Footprint.of(config, dtype, format=quantize).weight_bytes, device)
    chosen = set() if quantize is None else set(quantized_names(config, quantize))
    with torch.device("meta"):
        model = HybridLM(config)
    for name, weight in random_weights(model, dtype, seed, device):
        owner, _, leaf = name.rpartition(".")
        if quantize is not None and name in chosen:
            replace(model, owner, quantized_linear(name, weight, quantize))
            continue
        setattr(model.get_submodule(owner), leaf, nn.Parameter(whole(weight), requires_grad=False))
    return model.eval()


def random_weights(
    model: HybridLM, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> Iterator[tuple[str, Tensor | RepeatedRows]]:
    """Yield every parameter of a model as (name, values), drawn by the initialization rules of the family.

    model: is asked for names and shapes only, and may be on the meta device. A large matrix repeats one block
        of normal numbers of its standard deviation, since drawing 9e9 numbers takes minutes and copying them
        seconds; `whole` makes a tensor of it.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(BLOCK).normal_(generator=generator)
    for name, parameter in list(model.named_parameters()):
        large = parameter.numel() > LARGE
        drawn = torch.empty(4096 if large else parameter.shape)  # a sample of a large one gives its scale
        fill(drawn, name, model.config, generator)
        values = (block * drawn.std() if large else drawn).to(device, dtype)
        yield name, RepeatedRows(parameter.shape, values) if large else values


def whole(weight: Tensor | RepeatedRows) -> Tensor:
    """A weight as a tensor."""
    return weight.tensor() if isinstance(weight, RepeatedRows) else weight


class RepeatedRows:
    """A matrix [N, K] that repeats one block of at least K numbers; its rows are made on access."""

    is_meta = False

    def __init__(self, shape: torch.Size, block: Tensor) -> None:
        self.shape, self.device = shape, block.device
        self._twice, self._length = torch.cat([block, block]), len(block)

    def __getitem__(self, rows: slice) -> Tensor:
        """Some consecutive rows, together no more numbers than the block has."""
        width = self.shape[1]
        begin = rows.start * width % self._length
        return self._twice[begin : begin + (rows.stop - rows.start) * width].view(-1, width)

    def tensor(self) -> Tensor:
        """All rows."""
        repeat(value := self._twice.new_empty(self.shape), self._twice[: self._length])
        return value


def stand_in_tokenizer(config: HybridConfig) -> Tokenizer:
    """A tokenizer for a model that has none.

    It is tekken where the vocabulary has its size and mistral-common is installed. Else it has the special
    tokens, the 256 bytes, and a word like ⟨1234⟩ for every further id.
    """
    if config.vocab_size == TEKKEN and (tokenizer := _tekken()) is not None:
        return tokenizer
    special_tokens = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{number}>" for number in range(3, 13))]
    words = [bytes([value]) for value in range(256)]
    words += [f"⟨{number}⟩".encode() for number in range(len(special_tokens) + 256, config.vocab_size)]
    return Tokenizer(assemble(special_tokens, map(to_characters, words), []))


def _tekken() -> Tokenizer | None:
    try:
        return tekken()
    except MissingExtraError:
        return None


def repeat(value: Tensor, block: Tensor) -> None:
    """Fill a contiguous tensor with copies of one block."""
    flat = value.view(-1)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])
