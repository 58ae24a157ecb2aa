"""Documents that came before: exactly, or nearly so by MinHash."""

import re
from hashlib import blake2b

from nanohybrid.extras import require

PERMUTATIONS = 128
BANDS = 32  # bands of four rows find candidates down to a similarity of about 0.4; the estimate over all rows then decides
SHINGLE = 5


class ExactDuplicates:
    """Remembers a hash of every text, blind to white space."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def add(self, text: str) -> bool:
        """Remember a text; true if it was there already."""
        key = blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self.seen:
            return True
        self.seen.add(key)
        return False


class NearDuplicates:
    """Remembers what it kept by MinHash over runs of five words (extra `data`: rensa)."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.rensa = require("rensa", "data")
        self.index = self.rensa.RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self.kept: list[object] = []

    def add(self, text: str) -> bool:
        """True if a text like it was kept before; else remember it."""
        sketch = self.rensa.RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(shingles(text))
        if any(sketch.jaccard(self.kept[key]) >= self.threshold for key in self.index.query(sketch)):
            return True
        self.index.insert(len(self.kept), sketch)
        self.kept.append(sketch)
        return False


def shingles(text: str) -> list[str]:
    """Runs of five words, lower case; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))]
