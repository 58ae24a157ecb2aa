"""Exact duplicates by hash, and near duplicates by MinHash (Broder 1997)."""

import re
from hashlib import blake2b

from nanohybrid.extras import require

PERMUTATIONS = 128
# bands of 4 rows find candidates of similarity 0.4 and more; the estimate over all permutations decides
BANDS = 32
SHINGLE = 5


class ExactDuplicates:
    """Hashes of all texts so far; white space does not count."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def add(self, text: str) -> bool:
        """Add a text. Returns True if it is a duplicate."""
        key = blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self.seen:
            return True
        self.seen.add(key)
        return False


class NearDuplicates:
    """MinHash sketches, over 5-word shingles, of all texts that were not near duplicates. Needs rensa (extra
    `data`).

    threshold: Jaccard similarity from which two texts count as duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.rensa = require("rensa", "data")
        self.index = self.rensa.RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self.sketches: list[object] = []

    def add(self, text: str) -> bool:
        """Returns True if a similar text was added before; otherwise adds the text."""
        sketch = self.rensa.RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(shingles(text))
        if any(sketch.jaccard(self.sketches[key]) >= self.threshold for key in self.index.query(sketch)):
            return True
        self.index.insert(len(self.sketches), sketch)
        self.sketches.append(sketch)
        return False


def shingles(text: str) -> list[str]:
    """All runs of 5 lower-case words; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))]
