"""The tokenizer of Nemotron Nano 2, which is Mistral NeMo's tekken, rebuilt from the file in the package
mistral-common.

The file lists tokens by rank, without merges. The merge of a token is found by BPE on its own bytes with the
merges of lower rank; two parts remain. On any text this gives the result of a rank-driven BPE, because merges
inside a span of text do not depend on its surroundings as long as no merge crosses its border.
"""

import base64
import json
from pathlib import Path
from typing import Any

from nanohybrid.errors import InputError
from nanohybrid.extras import require
from nanohybrid.text.bytelevel import assemble, to_characters
from nanohybrid.text.tokenizer import Tokenizer

FILE = "tekken_240718.json"
NAMED_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"),
)


def tekken(path: Path | str | None = None) -> Tokenizer:
    """The tokenizer of the official checkpoints: 1,000 special tokens, then 130,072 tokens by rank.

    path: the file tekken_240718.json; None uses that of the installed mistral-common. Raises InputError for a
    missing or damaged file, MissingExtraError without mistral-common.
    """
    file = Path(path) if path is not None else _installed()
    config, entries = _parts(file)
    try:
        special_count, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        ranked = [base64.b64decode(entry["token_bytes"]) for entry in entries[: size - special_count]]
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a tekken file like {FILE} ({error!r})") from None
    if len(ranked) != size - special_count or ranked[:256] != [bytes([value]) for value in range(256)]:
        raise InputError(
            f"{file}: has {len(ranked)} tokens; its configuration says {size - special_count}, starting with "
            "the 256 bytes"
        )
    special_tokens = [
        *NAMED_SPECIAL_TOKENS,
        *(f"<SPECIAL_{number}>" for number in range(len(NAMED_SPECIAL_TOKENS), special_count)),
    ]
    merges = [(to_characters(left), to_characters(right)) for left, right in _merges(ranked, file)]
    return Tokenizer(assemble(special_tokens, map(to_characters, ranked), merges, pattern))


def _installed() -> Path:
    package = require("mistral_common", "data")
    return Path(str(package.__file__)).parent / "data" / FILE


def _parts(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["config"], sorted(content["vocab"], key=lambda entry: entry["rank"])
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; mistral-common ships it as data/{FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a tekken file like {FILE} ({error!r})") from None


def _merges(ranked: list[bytes], file: Path) -> list[tuple[bytes, bytes]]:
    ranks = {token: rank for rank, token in enumerate(ranked)}
    merges = []
    for rank in range(256, len(ranked)):
        parts = _split(ranked[rank], ranks, rank)
        if len(parts) != 2:
            raise InputError(
                f"{file}: token {rank} is not the merge of two earlier tokens; the file is damaged"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _split(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """BPE of `token` with the merges of rank below `limit`, lowest rank first, leftmost first."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(parts[index] + parts[index + 1], limit) for index in range(len(parts) - 1)]
        best = min(candidates)
        if best >= limit:
            break
        index = candidates.index(best)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts
