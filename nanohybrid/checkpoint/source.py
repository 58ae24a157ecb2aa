"""What people call a model, and where its files are.

    runs/sft                                    a directory, or a .gguf file: as it is
    nvidia/NVIDIA-Nemotron-Nano-9B-v2           an id of the Hugging Face Hub: its files in the Hub's cache
    nvidia/NVIDIA-Nemotron-Nano-9B-v2@v1.0      the same at a branch, a tag or a commit
    org/name-GGUF/name-Q8_0.gguf                one .gguf file of a repository, also with @revision
    ~/.cache/huggingface/hub/models--org--name  the cache's folder of a repository: its newest snapshot

A path that exists is a path, whatever else it could mean. Ids go through huggingface_hub, which downloads,
caches and resumes, shows progress, and takes the token from the environment. Of a repository only weights
(safetensors), JSON, Jinja and text files are downloaded: no code, and no pickle.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nanohybrid.errors import CheckpointError, shown

HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<file>(?:[\w-][\w.-]*/)*[\w-][\w.-]*\.gguf))?"
    r"(?:@(?P<revision>[\w-][\w./-]*))?"
)
TEXTS = ["*.json", "*.jinja", "*.txt"]
WEIGHTS = ["*.safetensors"]
NOT_OURS = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*.safetensors"]
"""Files in folders belong to other programs, and `consolidated` is Mistral's second copy of the weights."""
CACHE_FOLDER = re.compile(r"models--(?P<organization>.+?)--(?P<name>.+)")
MAIN = "main"


def resolve(model: str | Path, weights: bool = True) -> Path:
    """The directory or .gguf file of a model, downloaded where `model` is an id of the Hub.

    weights: whether its weights are needed, or only its configuration and tokenizer. What is neither a path
    that exists nor an id is returned as it is. Raises CheckpointError, in one line with the way out, for an
    id whose files cannot be had, and for a revision that a cache folder does not have.
    """
    text, path = os.fspath(model), Path(model)
    try:
        if path.exists():
            return _newest(path) if _is_cache_folder(path) else path
        folder, _, revision = text.rpartition("@")
        if folder and _is_cache_folder(Path(folder)):
            return _snapshot(Path(folder), revision)
    except OSError as error:  # a name that no file can have, a folder without permission
        raise CheckpointError(f"{shown(text)}: cannot be looked up ({error.strerror})") from None
    found = HUB_ID.fullmatch(text)
    return path if found is None else _from_hub(text, found, weights)


def display_name(path: Path) -> str:
    """The name of a model: that of its directory or file; of a snapshot in the Hub's cache, its id."""
    if path.suffix == ".gguf":
        return path.stem
    directory = path.resolve()
    ids = [found for parent in directory.parents if (found := CACHE_FOLDER.fullmatch(parent.name))]
    return f"{ids[0]['organization']}/{ids[0]['name']}" if ids else directory.name


def _is_cache_folder(path: Path) -> bool:
    return (path / "snapshots").is_dir() and not (path / "config.json").exists()


def _newest(folder: Path) -> Path:
    """The snapshot of `main`, or the only one."""
    snapshots = sorted(one.name for one in (folder / "snapshots").iterdir())
    if not (folder / "refs" / MAIN).is_file() and len(snapshots) == 1:
        return folder / "snapshots" / snapshots[0]
    return _snapshot(folder, MAIN)


def _snapshot(folder: Path, revision: str) -> Path:
    """The snapshot of a branch, a tag, or a commit (its first digits suffice)."""
    names = sorted(one.name for one in (folder / "snapshots").iterdir())
    reference = folder / "refs" / revision
    if ".." not in revision.split("/") and reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
        if commit in names:
            return folder / "snapshots" / commit
    fitting = [name for name in names if revision and name.startswith(revision)]
    if len(fitting) == 1:
        return folder / "snapshots" / fitting[0]
    known = ", ".join(name[:12] for name in names) or "none"
    raise CheckpointError(f"{folder}: has no single snapshot of {revision}; add one as @REVISION: {known}")


def _from_hub(text: str, found: re.Match[str], weights: bool) -> Path:
    """The files of an id: from the Hub, or from its cache where the Hub cannot be reached."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, file, revision = found["id"], found["file"], found["revision"]
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        patterns = [*TEXTS, *(WEIGHTS if weights else [])]
        path = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_OURS
            )
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{text}: its files need consent on the Hub: accept the terms on the model's page, then "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{text}: no such directory, and no such model on the Hub (a private one needs `hf auth login` "
            "or HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{text}: the Hub's {repository} has no revision {revision}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        path = _from_cache(text, repository, file, revision, weights)
        if file is not None:
            return path
    except EntryNotFoundError:
        what = "lists a file that it does not have" if file is None else f"has no file {file}"
        raise CheckpointError(f"{text}: the Hub's {repository} {what}") from None
    except HFValidationError as error:
        raise CheckpointError(f"{text}: no such directory, and no id of the Hub ({error})") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise CheckpointError(f"{text}: the Hub answered {status}; try again later") from None
    except Exception as error:  # of the connection or the disk, by the library's HTTP client
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(
            f"{text}: the download failed ({reason}); the same command resumes it"
        ) from error
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{text}: the repository has no config.json; of one with .gguf files, name the file: "
            f"{repository}/FILE.gguf"
        )
    return path


def _from_cache(text: str, repository: str, file: str | None, revision: str | None, weights: bool) -> Path:
    """The snapshot in the Hub's cache, complete enough to be read."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    command = f"hf download {repository}{f' {file}' if file else ''}"
    command += f" --revision {revision}" if revision else ""
    if _is_cache_folder(folder):
        path = _newest(folder) if revision is None else _snapshot(folder, revision)
        if file is not None and (path / file).is_file():
            return path / file
        whole = (path / "config.json").is_file() and (not weights or any(path.glob("*.safetensors")))
        if file is None and whole:
            return path
    raise CheckpointError(
        f"{text}: no such directory, not in the Hub's cache, and the Hub cannot be reached; with a "
        f"connection: {command}"
    )
