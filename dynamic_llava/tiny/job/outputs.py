"""What a row has answered, and a seed's finished rows as files, so that an interrupted job measures no row twice."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.eval.predict import Prediction
from dynamic_llava.files import replace_file, writing
from dynamic_llava.methods import Method, print_method
from dynamic_llava.provenance import source_digest
from dynamic_llava.tiny.job.rows import Row


@dataclass(frozen=True)
class RowOutput:
    """One row's answers and descriptions, in the order of the test set."""

    answers: Sequence[Prediction]
    descriptions: Sequence[Prediction]

    def first(self, answers: int, descriptions: int) -> "RowOutput":
        """The outputs of the first queries of each kind."""
        return RowOutput(self.answers[:answers], self.descriptions[:descriptions])


@dataclass(frozen=True)
class MeasuredRow:
    """What measuring a row has given."""

    metrics: dict[str, float]
    output: RowOutput | None
    """None where the row generates nothing."""
    seconds: float


class RowFiles:
    """The measured rows of one seed: <folder>/<key>.json each.

    A file counts if its row is the same (model, method, path) under the same `fingerprint`: settings, trainings and
    library versions. Which source code has measured it is noted in it, and in `older` where it was another.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint, self._source = folder, fingerprint, source_digest()
        self.older: list[str] = []
        """Keys of the rows read so far that other source code has measured."""

    def read(self, row: Row) -> MeasuredRow | None:
        """Return what is known of a row; None where it is to be measured."""
        try:
            found = json.loads((self.folder / f"{row.key}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if found["identity"] != self._identity(row):
            return None
        if found["source"] != self._source:
            self.older.append(row.key)
        output = found["output"]
        return MeasuredRow(
            found["metrics"],
            None if output is None else RowOutput(*(list(map(_prediction, output[name])) for name in _PARTS)),
            found["seconds"],
        )

    def write(self, row: Row, measured: MeasuredRow) -> None:
        """Keep what measuring a row has given. WriteError where the file cannot be written."""
        values = {"identity": self._identity(row), "source": self._source, **asdict(measured)}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / f"{row.key}.json", json.dumps(values) + "\n")

    def _identity(self, row: Row) -> str:
        switches = {name: print_method(one) if isinstance(one, Method) else one for name, one in row.switches.items()}
        told = [self._fingerprint, row.key, row.model, row.use_cache, row.generates, row.subset, switches]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


_PARTS = ("answers", "descriptions")


def _prediction(values: dict[str, Any]) -> Prediction:
    """Return a prediction as it was before JSON made lists of its tuples."""
    return Prediction(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
