"""Statistics of a corpus: stats.json and report.html."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.data.corpus import VALIDATION
from nanohybrid.data.curate.curator import PASSED
from nanohybrid.data.documents import Document
from nanohybrid.data.mixture import Mixture
from nanohybrid.files import atomic_write
from nanohybrid.stages import Report
from nanohybrid.text import Tokenizer

STATS = "stats.json"


@dataclass
class StoreStats:
    """Statistics of one store. majority: accuracy of always giving the most common answer (problems only)."""

    name: str
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    learned: int = 0
    majority: float | None = None
    example: str = ""

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents unchanged and count them."""
        for document in documents:
            self.documents += 1
            self.characters += sum(len(span.text) for span in document.spans)
            self.example = self.example or document.text
            yield document


def describe(
    stats: Mapping[str, StoreStats], counts: Mapping[str, Counter[str]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """All counts, by store; the totals leave out held-out stores."""
    stores: dict[str, dict[str, Any]] = {
        name: {
            "documents": store.documents,
            "characters": store.characters,
            "tokens": store.tokens,
            "learned_tokens": store.learned,
            "dropped": {
                reason: count for reason, count in sorted(counts.get(name, {}).items()) if reason != PASSED
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
    """Write stats.json and report.html."""
    atomic_write(directory / STATS, json.dumps(measures, indent=1) + "\n")
    stores = measures["stores"]
    report = Report("nanohybrid data")
    report.text(
        f"{measures['documents']:,} documents, {measures['tokens']:,} tokens of a vocabulary of "
        f"{measures['vocab_size']:,}. "
        f"{measures['learned_tokens']:,} tokens have a loss; the questions of problems have none."
    )
    report.section("Stores").table(
        ["store", "documents", "tokens", "tokens with loss", "characters per token", "most common answer"],
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
    report.section("Dropped documents").table(
        ["store", "reason", "documents"],
        [
            [name, reason, count]
            for name, store in stores.items()
            for reason, count in store["dropped"].items()
        ],
    )
    names = mixture.names
    report.section("Mixture").text("Shares of tokens in each phase of training.")
    report.table(
        ["until (fraction of the run)", *names],
        [[phase.until, *(f"{phase.shares.get(name, 0):.1%}" for name in names)] for phase in mixture.phases],
    )
    report.section("One document of each store")
    for name, store in stats.items():
        if not name.startswith(VALIDATION):
            report.text(f"**{name}**").code(store.example[:1000])
    report.write(directory / "report.html")


def read_stats(directory: Path) -> dict[str, Any]:
    """The statistics of a built corpus (`describe`)."""
    stats: dict[str, Any] = json.loads((directory / STATS).read_text())
    return stats
