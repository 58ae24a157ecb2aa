"""All filters in order, with counts of the dropped documents by store and reason."""

from collections import Counter
from collections.abc import Iterable, Iterator

from nanohybrid.data.curate.decontaminate import Decontaminator
from nanohybrid.data.curate.duplicates import ExactDuplicates, NearDuplicates
from nanohybrid.data.curate.quality import QualityLimits, failed_heuristic
from nanohybrid.data.documents import Document

PASSED = "kept"  # the key of `counts` for documents that passed


class Curator:
    """Filters documents; `counts` has, for each store, the number that passed and the numbers dropped, by
    reason.

    near_duplicate_threshold: Jaccard similarity from which two texts count as duplicates; 0 turns this filter
    off.
    """

    def __init__(
        self, limits: QualityLimits, near_duplicate_threshold: float, decontaminator: Decontaminator
    ) -> None:
        self.limits = limits
        self.exact = ExactDuplicates()
        self.near = NearDuplicates(near_duplicate_threshold) if near_duplicate_threshold > 0 else None
        self.decontaminator = decontaminator
        self.counts: dict[str, Counter[str]] = {}

    def texts(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Documents of natural text that pass every filter."""
        for document in documents:
            if self._count(document, self._reason_to_drop(document.text)):
                yield document

    def problems(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Generated problems that are new and not of the test split.

        Near duplicates pass, since problems are alike.
        """
        for document in documents:
            prompt = document.spans[0].text
            test = self.decontaminator.is_test_problem(prompt.rstrip("\n"))
            if self._count(
                document, "test split" if test else "exact duplicate" if self.exact.add(prompt) else None
            ):
                yield document

    def _reason_to_drop(self, text: str) -> str | None:
        failed = failed_heuristic(text, self.limits)
        if failed is not None:
            return failed
        if self.exact.add(text):
            return "exact duplicate"
        if self.decontaminator.is_contaminated(text):
            return "evaluation prompt"
        return "near duplicate" if self.near is not None and self.near.add(text) else None

    def _count(self, document: Document, reason: str | None) -> bool:
        self.counts.setdefault(document.store, Counter())[reason or PASSED] += 1
        return reason is None
