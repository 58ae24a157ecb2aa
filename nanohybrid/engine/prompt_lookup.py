"""Speculative decoding by prompt lookup (n-gram matching). No torch.

The draft is what followed the latest tokens where they occurred before (Saxena, "Prompt lookup decoding",
2023).

A draft needs no model. The scheduler puts it after the token that is due, the model computes all of it in one
step, and the sampler goes position by position for as long as it samples what the draft says (engine.py).
What is sampled at a position depends on the logits and on (seed, position) alone, so a draft changes when a
token is found, never which.

Where a text does not repeat itself, drafts are wasted rows. The length of a draft grows while all of it is
accepted and shrinks to what was accepted; after a draft of which nothing was, the request pauses, twice as
long each time.
"""

from array import array
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from nanohybrid.engine.request import Request

MOST_DRAFT_TOKENS = 15  # with the token that is due, a window of 16, to which a ragged batch pads in any case
NGRAMS = (2, 3, 5, 8)  # lengths of what is looked up; where a shorter one is not found, no longer one is
MAX_PAUSE = 64  # tokens from a draft that was rejected to the next
ID_BYTES = 4


class History:
    """The tokens of one request, and how its drafts did."""

    def __init__(self, limit: int) -> None:
        self.text = bytearray()  # ids as int32, since bytes are searched fastest
        self.length = 0  # tokens in it
        self.limit = limit  # the longest draft that is worth making
        self.pause, self.failures = 0, 0

    def propose(self, count: int) -> list[int]:
        """What followed the longest match, `count` tokens; empty without a match.

        A match that reaches the end of the text is continued periodically.
        """
        position = -1
        for ngram in NGRAMS:
            found = self._latest(ngram)
            if found < 0:
                break
            position = found + ngram
        if position < 0:
            return []
        following = array("i", bytes(self.text[position * ID_BYTES : (position + count) * ID_BYTES])).tolist()
        period = len(following)
        while len(following) < count:
            following.append(following[-period])
        return following

    def _latest(self, ngram: int) -> int:
        """The latest earlier position of the last `ngram` tokens; -1 where there is none."""
        tail = self.text[-ngram * ID_BYTES :]
        end = len(self.text) - ID_BYTES
        while len(tail) == ngram * ID_BYTES:
            at = self.text.rfind(tail, 0, end)
            if at % ID_BYTES == 0 or at < 0:
                return at // ID_BYTES
            end = at + len(tail) - 1
        return -1


class PromptLookupProposer:
    """Makes the drafts of all requests. max_tokens: of one draft, 1 to MOST_DRAFT_TOKENS.

    `num_draft_tokens` and `num_accepted_tokens` count over all requests.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_draft_tokens, self.num_accepted_tokens = 0, 0
        self._histories: WeakKeyDictionary[Request, History] = WeakKeyDictionary()

    def propose(self, request: "Request", limit: int) -> list[int]:
        """At most `limit` tokens that may follow those of the request.

        What the thinking budget inserts is drafted too: it is certain to be accepted.
        """
        if request.forced:
            return list(request.forced)[: min(limit, self.max_tokens)]
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = History(self.max_tokens)
        if history.pause or limit < 1:
            history.pause = max(history.pause - 1, 0)
            return []
        tokens = request.slice(history.length, request.num_tokens - history.length)
        history.text += array("i", tokens).tobytes()
        history.length = request.num_tokens
        return history.propose(min(limit, history.limit))

    def update(self, request: "Request", accepted: int) -> None:
        """Record that `accepted` tokens of the request's draft were sampled."""
        drafted = len(request.draft)
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        history = self._histories.get(request)
        if history is None:
            return
        if accepted:
            history.failures = 0
            history.limit = min(2 * drafted, self.max_tokens) if accepted == drafted else accepted
        else:
            history.failures += 1
            history.limit = 1
            history.pause = min(2**history.failures, MAX_PAUSE)
