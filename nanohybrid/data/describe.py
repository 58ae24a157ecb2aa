"""What a corpus turned out to be: numbers for machines, a page for people."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.data.corpus import VALIDATION
from nanohybrid.data.documents import Document
from nanohybrid.data.mixture import Mixture
from nanohybrid.files import atomic_write
from nanohybrid.stages import Report
from nanohybrid.text import Tokenizer

STATS = "stats.json"


@dataclass
class StoreStats:
    """What went into one store. majority: how often its commonest answer is right (problems only)."""

    name: str
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    learned: int = 0
    majority: float | None = None
    example: str = ""

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, counted as they pass."""
        for document in documents:
            self.documents += 1
            self.characters += sum(len(piece.text) for piece in document.pieces)
            self.example = self.example or document.text
            yield document


def describe(
    stats: Mapping[str, StoreStats], counts: Mapping[str, Counter[str]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Everything counted; the totals are those of training, without what is held out."""
    stores: dict[str, dict[str, Any]] = {
        name: {
            "documents": store.documents,
            "characters": store.characters,
            "tokens": store.tokens,
            "learned_tokens": store.learned,
            "dropped": {
                reason: count for reason, count in sorted(counts.get(name, {}).items()) if reason != "kept"
            },
            **({} if store.majority is None else {"majority_rate": round(store.majority, 4)}),
        }
        for name, store in stats.items()
    }
    keys = ("documents", "tokens", "learned_tokens")
    totals = {
        key: sum(store[key] for name, store in stores.items() if not name.startswith(VALIDATION))
        for key in keys
    }
    return {"vocab_size": tokenizer.vocab_size, **totals, "stores": stores}


def write_report(
    directory: Path, measures: Mapping[str, Any], mixture: Mixture, stats: Mapping[str, StoreStats]
) -> None:
    """stats.json and report.html."""
    atomic_write(directory / STATS, json.dumps(measures, indent=1) + "\n")
    stores = measures["stores"]
    report = Report("nanohybrid data")
    report.text(
        f"{measures['documents']:,} documents, {measures['tokens']:,} tokens of a vocabulary of {measures['vocab_size']:,}, of which "
        f"{measures['learned_tokens']:,} are learned (the questions of problems are only read)."
    )
    report.section("Stores").table(
        ["store", "documents", "tokens", "learned", "characters a token", "commonest answer"],
        [
            [
                name,
                store["documents"],
                store["tokens"],
                store["learned_tokens"],
                store["characters"] / max(store["tokens"], 1),
                f"{store['majority_rate']:.1%}" if "majority_rate" in store else "",
            ]
            for name, store in stores.items()
        ],
    )
    report.section("Dropped").table(
        ["store", "reason", "documents"],
        [
            [name, reason, count]
            for name, store in stores.items()
            for reason, count in store["dropped"].items()
        ],
    )
    names = mixture.names
    report.section("Mixture").text("Shares of tokens in each phase of a run.")
    report.table(
        ["until", *names],
        [[phase.until, *(f"{phase.shares.get(name, 0):.1%}" for name in names)] for phase in mixture.phases],
    )
    report.section("A document of each")
    for name, store in stats.items():
        if not name.startswith(VALIDATION):
            report.text(f"**{name}**").code(store.example[:1000])
    report.write(directory / "report.html")


def read_stats(directory: Path) -> dict[str, Any]:
    """What `describe` counted, from a built corpus."""
    stats: dict[str, Any] = json.loads((directory / STATS).read_text())
    return stats
