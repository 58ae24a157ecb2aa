"""The filters in their order, and the account of what they dropped."""

from collections import Counter
from collections.abc import Iterable, Iterator

from nanohybrid.data.curate.decontaminate import Decontaminator
from nanohybrid.data.curate.duplicates import ExactDuplicates, NearDuplicates
from nanohybrid.data.curate.quality import QualityLimits, fault
from nanohybrid.data.documents import Document


class Curator:
    """Filters documents and counts, for every store, what was kept and what was dropped for which reason.

    near: similarity from which two texts count as one (0 switches the near-duplicate filter off).
    """

    def __init__(self, limits: QualityLimits, near: float, decontaminator: Decontaminator) -> None:
        self.limits = limits
        self.exact = ExactDuplicates()
        self.near = NearDuplicates(near) if near > 0 else None
        self.decontaminator = decontaminator
        self.counts: dict[str, Counter[str]] = {}

    def texts(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Documents of natural text that pass every filter."""
        for document in documents:
            if self._count(document, self._text_fault(document.text)):
                yield document

    def problems(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Generated problems that are new and not of the test split; that they resemble each other is in their nature."""
        for document in documents:
            prompt = document.pieces[0].text
            test = self.decontaminator.catches_prompt(prompt.rstrip("\n"))
            if self._count(
                document, "test split" if test else "exact duplicate" if self.exact.add(prompt) else None
            ):
                yield document

    def _text_fault(self, text: str) -> str | None:
        low = fault(text, self.limits)
        if low is not None:
            return low
        if self.exact.add(text):
            return "exact duplicate"
        if self.decontaminator.catches(text):
            return "evaluation prompt"
        return "near duplicate" if self.near is not None and self.near.add(text) else None

    def _count(self, document: Document, reason: str | None) -> bool:
        self.counts.setdefault(document.store, Counter())[reason or "kept"] += 1
        return reason is None
