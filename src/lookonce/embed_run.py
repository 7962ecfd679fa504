"""The work of `lookonce embed`: rows in, vectors out, batch by batch.

Which rows go together depends on the rows alone, and each batch has an embedder that has seen no other: so a run that
goes on where a killed one stopped gives the same bytes as one that was left alone. Knows nothing of the terminal.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from lookonce.embed_input import Row
from lookonce.errors import DeviceError, InputError, ModelFileError, NotFiniteError
from lookonce.look_plan import check_file

if TYPE_CHECKING:
    from lookonce.embedder import Embedder

__all__ = ["EmbeddedBatch", "Skipped", "VectorSink", "embed_rows", "format_vector", "refuse_nothing"]

logger = logging.getLogger(__name__)

# A batch is done within minutes on a CPU, so that little is lost with a killed run.
_MOST_CHARACTERS: Final = 32_768
_PICTURE_CHARACTERS: Final = 2_048  # a picture costs as much as a text of about so many


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was passed over, and why."""

    index: int
    label: str
    reason: str
    id: str | int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedBatch:
    """What became of some rows: `vectors`, (n, dimension), are those of the `kept` ones."""

    rows: Sequence[Row]
    kept: Sequence[Row]
    vectors: NDArray[np.float32]
    skipped: Sequence[Skipped]


class VectorSink(Protocol):
    """Where vectors go."""

    def append(self, batch: EmbeddedBatch) -> None:
        """Take what became of the next rows."""

    def finish(self) -> None:
        """Take note that there are no more. Raises InputError where there was no vector at all."""


def embed_rows(
    new_embedder: "Callable[[], Embedder]",
    rows: Iterable[Row],
    sink: VectorSink,
    *,
    batch_size: int,
    skip_errors: bool,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Embed rows, in their order, into `sink`; `advance` is told how many more are done.

    Raises InputError for a row that cannot be embedded; with `skip_errors` such a row is a warning in the log.
    """
    for batch in _batches(rows, batch_size):
        sink.append(_embed_batch(new_embedder, batch, skip_errors=skip_errors))
        advance(len(batch))
    sink.finish()


def refuse_nothing(n_rows: int, n_vectors: int) -> None:
    """Raise InputError where rows gave no vector at all."""
    if not n_vectors:
        raise InputError(
            f"none of {n_rows} rows could be embedded" if n_rows else "there is nothing to embed: give rows"
        )


def format_vector(row: Row, vector: NDArray[np.float32]) -> str:
    """A row's vector as one line of JSON: the fewest digits that are read back as the same float32."""
    name = f'"index": {row.index}' if row.id is None else f'"id": {json.dumps(row.id)}'
    return f'{{{name}, "vector": [{", ".join(map(str, vector))}]}}\n'


def _batches(rows: Iterable[Row], batch_size: int) -> Iterator[list[Row]]:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give a whole number of at least 1")
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        text = row.item.get("text", "") if row.item else ""
        characters += len(text) + _PICTURE_CHARACTERS * len(row.pictures)
        if len(batch) == batch_size or characters >= _MOST_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _embed_batch(new_embedder: "Callable[[], Embedder]", batch: Sequence[Row], *, skip_errors: bool) -> EmbeddedBatch:
    skipped: list[Skipped] = []

    def give_up(row: Row, reason: str, error: InputError | NotFiniteError | None = None) -> None:
        if not skip_errors:
            raise InputError(f"{row.label} cannot be embedded: {reason}") from error
        logger.warning("%s was passed over: %s", row.label, reason)
        skipped.append(Skipped(row.index, row.label, reason, row.id))

    kept: list[Row] = []
    for row in batch:
        if problem := row.problem or _picture_problem(row):
            give_up(row, problem)
        else:
            kept.append(row)
    vectors = np.empty((0, 0), dtype=np.float32)
    while kept:
        try:
            with new_embedder() as embedder:  # what another has evaluated before would change the last bits
                vectors = embedder.embed_batch([row.item for row in kept if row.item], batch_size=len(kept))
            break
        except (ModelFileError, DeviceError) as error:  # no row's fault
            raise type(error)(_culprit(error)[1]) from error
        except (InputError, NotFiniteError) as error:
            place, reason = _culprit(error)
            give_up(kept.pop(place), reason, error)
    skipped.sort(key=lambda one: one.index)
    return EmbeddedBatch(batch, kept, vectors, skipped)


def _culprit(error: InputError | NotFiniteError) -> tuple[int, str]:
    """Which item of a batch the embedder could not embed, and why. Raises the error again where it is none's fault."""
    if error.item is None:
        raise error
    return error.item, str(error.__cause__)


def _picture_problem(row: Row) -> str:
    """Why a picture's file cannot be used: most are found out before the others of their batch cost work."""
    try:
        for picture in row.pictures:
            check_file(picture)
    except InputError as error:
        return str(error)
    return ""
