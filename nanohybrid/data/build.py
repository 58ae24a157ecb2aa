"""The stage `data`: sources -> quality filter -> deduplication -> decontamination -> tokenizer -> token
stores.

Natural text stays in memory, because the tokenizer is trained on all of it; problems are generated and
tokenized as a stream.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

from nanohybrid.checkpoint import resolve
from nanohybrid.data.corpus import VALIDATION, store_path, write_mixture
from nanohybrid.data.curate import Curator, Decontaminator
from nanohybrid.data.describe import StoreStats, describe, write_report
from nanohybrid.data.documents import Document, up_to
from nanohybrid.data.recipe import DataRecipe, TaskSource
from nanohybrid.data.sources import files, problems, python_install
from nanohybrid.data.store import TokenStore
from nanohybrid.data.tokenize import encode
from nanohybrid.errors import ConfigError
from nanohybrid.gguf import is_gguf
from nanohybrid.stages import Progress, Stage, open_stage, progress
from nanohybrid.text import Tokenizer, train_bpe
from nanohybrid.text.chat import ChatTemplate

T = TypeVar("T")

# The frame of every chat, without a problem. If its tags are one or two tokens instead of six, the sequences
# of a small model are shorter. Repeated, so that their byte pairs outnumber those of the text.
CHAT_FRAME = ("System\n\n", "User\n", "Assistant\n", "<think>\n", "</think>\n\n", "<think></think>")
FRAME_REPEATS = 5000
TOKENIZER_ASSETS = ("chat_template.jinja", "tokenizer_config.json", "config.json", "generation_config.json")
"""Files beside `tokenizer.json` that are read too: the chat template and the ids of special tokens."""


def build(recipe: DataRecipe, out: Path) -> Path:
    """Build the corpus of a recipe in the directory `out`, which is returned.

    Raises ConfigError or InputError for sources, tasks or a tokenizer that cannot be used.
    """
    sources = [(source, source.resolved()) for source in recipe.tasks]
    inputs = {
        f"files.{index}": path for index, path in enumerate((*recipe.files, *recipe.decontaminate_against))
    }
    given = None if recipe.tokenizer is None else resolve(recipe.tokenizer, weights=False)
    if given is not None and is_gguf(given):
        inputs["tokenizer"] = given
    elif given is not None:
        inputs["tokenizer"] = given / "tokenizer.json"
        beside = [given / name for name in TOKENIZER_ASSETS]
        inputs |= {f"tokenizer.{path.name}": path for path in beside if path.is_file()}
    with open_stage(out, "data", recipe, inputs, recipe.seed) as stage:
        if not stage.complete:
            Builder(recipe, stage, given).run(sources)
    return out


@dataclass
class Builder:
    """One run of the stage."""

    recipe: DataRecipe
    stage: Stage
    given_tokenizer: Path | None
    """The directory or GGUF file of the recipe's tokenizer; None: one is trained."""
    stats: dict[str, StoreStats] = field(default_factory=dict)

    def run(self, sources: list[tuple[TaskSource, tuple[int, ...]]]) -> None:
        recipe, directory = self.recipe, self.stage.directory
        prompts = [prompt for path in recipe.decontaminate_against for prompt in files.texts(path)]
        curator = Curator(recipe.quality, recipe.near_duplicate_threshold, Decontaminator(prompts))
        # 1. filtered natural text
        texts = {name: list(documents) for name, documents in self.texts(curator).items()}
        mixture = recipe.mixture.among(
            [
                *(name for name, documents in texts.items() if documents),
                *(problems.store_of(s.name) for s, _ in sources),
            ]
        )
        # 2. the tokenizer, trained on natural text and chat frames only: digits and signs of the problems
        # stay single tokens
        natural = (document.text for documents in texts.values() for document in documents)
        tokenizer = self.tokenizer(chain(natural, CHAT_FRAME * FRAME_REPEATS))
        tokenizer.save(directory)
        template = (
            ChatTemplate.default()
            if self.given_tokenizer is None
            else ChatTemplate.from_directory(self.given_tokenizer)
        )
        template.save(directory)
        # 3. the token stores
        total = sum(map(len, texts.values())) + sum(source.count for source, _ in sources)
        with progress("data", total, unit="doc") as bar:
            for name, documents in texts.items():
                self.write_texts(name, with_progress(documents, bar), tokenizer)
            for source, difficulties in sources:
                self.write_problems(source, difficulties, tokenizer, curator, bar)
        # 4. statistics and report
        write_mixture(directory, mixture)
        measures = describe(self.stats, curator.counts, tokenizer)
        self.stage.measure(**measures)
        self.stage.spend(tokens=measures["tokens"])
        write_report(directory, measures, mixture, self.stats)

    def texts(self, curator: Curator) -> dict[str, Iterator[Document]]:
        """Each source of natural text, filtered, up to its size."""
        recipe = self.recipe
        user_files = (
            document for path in recipe.files for document in files.files(path, recipe.section_characters)
        )
        sources: dict[str, tuple[Iterable[Document], float]] = {
            "prose": (python_install.prose(recipe.seed, recipe.section_characters), recipe.prose_megabytes),
            "code": (python_install.code(recipe.seed, recipe.section_characters), recipe.code_megabytes),
            "files": (user_files, recipe.files_megabytes),
        }
        return {
            name: up_to(curator.texts(documents), megabytes)
            for name, (documents, megabytes) in sources.items()
        }

    def tokenizer(self, texts: Iterable[str]) -> Tokenizer:
        """The given tokenizer, or one trained on `texts`.

        Raises ConfigError where they are too few for the vocabulary.
        """
        if self.given_tokenizer is not None:
            return Tokenizer.from_directory(self.given_tokenizer)
        tokenizer = train_bpe(texts, self.recipe.vocab_size)
        if tokenizer.vocab_size < self.recipe.vocab_size:
            raise ConfigError(
                f"vocab_size is {self.recipe.vocab_size}, but the text yields only {tokenizer.vocab_size} "
                "ids; add text or lower vocab_size"
            )
        return tokenizer

    def write_texts(self, name: str, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        """Write natural text; every n-th document is held out."""
        fraction = self.recipe.validation_fraction
        every = round(1 / fraction) if fraction else 0
        parts: dict[bool, list[Document]] = {False: [], True: []}
        for number, document in enumerate(documents, 1):
            parts[every > 0 and number % every == 0].append(document)
        for held_out, part in parts.items():
            if part:
                self.write(VALIDATION * held_out + name, tokenizer, part)

    def write_problems(
        self,
        source: TaskSource,
        difficulties: tuple[int, ...],
        tokenizer: Tokenizer,
        curator: Curator,
        bar: Progress,
    ) -> None:
        """Write problems of the training split, and some of the test split for the validation loss."""
        name = problems.store_of(source.name)
        seed = self.recipe.seed
        drawn = with_progress(problems.problems(source.name, difficulties, source.count, seed), bar)
        answers: Counter[str] = Counter()

        def documents() -> Iterator[Document]:
            for problem in drawn:
                answers[problem.answer] += 1
                yield problems.document(problem)

        stats = self.write(name, tokenizer, curator.problems(documents()))
        stats.majority = answers.most_common(1)[0][1] / answers.total()
        if held_out := round(source.count * self.recipe.validation_fraction):
            unseen = map(
                problems.document, problems.problems(source.name, difficulties, held_out, seed, "test")
            )
            self.write(VALIDATION + name, tokenizer, dict.fromkeys(unseen))

    def write(self, name: str, tokenizer: Tokenizer, documents: Iterable[Document]) -> StoreStats:
        """Tokenize documents into the store `name`."""
        stats = self.stats[name] = StoreStats(name)
        store = TokenStore.from_documents(encode(tokenizer, stats.watch(documents)))
        store.write(store_path(self.stage.directory, name))
        stats.tokens, stats.learned = store.token_count, int(store.loss_mask.sum())
        return stats


def with_progress(items: Iterable[T], bar: Progress) -> Iterator[T]:
    """Yield the items unchanged and advance the progress bar."""
    for item in items:
        bar.advance()
        yield item
