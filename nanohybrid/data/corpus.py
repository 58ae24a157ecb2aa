"""A built corpus on disk: token stores, the mixture over them, and a loader."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from nanohybrid.data.loader import Loader
from nanohybrid.data.mixture import Mixture
from nanohybrid.data.store import TokenStore
from nanohybrid.errors import InputError
from nanohybrid.files import atomic_write

MIXTURE, VALIDATION = "mixture.json", "validation-"


@dataclass(frozen=True)
class Corpus:
    """Training stores and held-out stores by name, and the mixture of the training stores.

    On disk a held-out store is `validation-NAME.safetensors`. The directory also has tokenizer.json and
    chat_template.jinja.
    """

    directory: Path
    stores: dict[str, TokenStore]
    validation: dict[str, TokenStore]
    mixture: Mixture

    @classmethod
    def read(cls, directory: Path | str) -> "Corpus":
        """Open the output of `nanohybrid data`; stores are memory-mapped.

        Raises InputError where it is not a corpus.
        """
        directory = Path(directory)
        try:
            phases = json.loads((directory / MIXTURE).read_text())
            mixture = Mixture.of([(phase["until"], phase["weights"]) for phase in phases])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{directory}: not a corpus ({MIXTURE}: {error}); `nanohybrid data --out DIR` builds one"
            ) from None
        stores = {path.stem: TokenStore.read(path) for path in sorted(directory.glob("*.safetensors"))}
        held_out = {
            name.removeprefix(VALIDATION): store
            for name, store in stores.items()
            if name.startswith(VALIDATION)
        }
        training = {name: store for name, store in stores.items() if not name.startswith(VALIDATION)}
        return cls(directory, training, held_out, mixture.among(training))

    def loader(self, *, batch_tokens: int, sequence_length: int, seed: int, total_steps: int) -> Loader:
        """The loader of a run of `total_steps`."""
        return Loader(self.stores, self.mixture, batch_tokens, sequence_length, seed, total_steps)


def store_path(directory: Path, name: str) -> Path:
    """The file of a store."""
    return directory / f"{name}.safetensors"


def write_mixture(directory: Path, mixture: Mixture) -> None:
    """Write the phases as mixture.json."""
    atomic_write(
        directory / MIXTURE,
        json.dumps([dataclasses.asdict(phase) for phase in mixture.phases], indent=1) + "\n",
    )
