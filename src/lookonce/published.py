"""What a hub published about a file whose card tells less: its size and SHA-256, kept when the file was fetched.

So that a later look at the file needs no network to know whether it is whole. One small JSON file for each hub,
repository, revision and file, in the user's data folder: processes that fetch different files do not meet.
"""

import hashlib
import json
from pathlib import Path

import platformdirs

from lookonce.cards import DEFAULT_REVISION, CardFile, ModelCard
from lookonce.durable import write_durably
from lookonce.hub import Source
from lookonce.hub_modelscope import REVISION
from lookonce.sha256_form import is_sha256

__all__ = ["complete", "recall", "remember"]


def recall(
    repository: str, file: CardFile, *, revision: str = DEFAULT_REVISION, source: Source = "huggingface"
) -> CardFile:
    """Give `file` with its size and hash as they were published, where the card itself has none."""
    if file.sha256 is not None:
        return file
    try:
        told = json.loads(_place(source, repository, revision, file).read_text("utf-8"))
        size_bytes, sha256 = told["size_bytes"], told["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # never fetched, or torn: it is fetched or checked once more
        return file
    except RuntimeError:  # there is no home folder, and so no record in it
        return file
    if not is_sha256(sha256) or not isinstance(size_bytes, int) or file.size_bytes not in (None, size_bytes):
        return file
    return CardFile(file.name, size_bytes, sha256)


def complete(card: ModelCard, file: CardFile) -> CardFile:
    """Give a card's file with what either hub published about it when it was fetched, where the card has none."""
    if card.huggingface:
        file = recall(card.huggingface, file, revision=card.revision)
    if card.modelscope:
        file = recall(card.modelscope, file, revision=REVISION, source="modelscope")
    return file


def remember(
    repository: str, file: CardFile, *, revision: str = DEFAULT_REVISION, source: Source = "huggingface"
) -> None:
    """Keep the size and hash of `file`. Raises OSError where they cannot be kept."""
    told = {"source": source, "repository": repository, "revision": revision, "file": file.name}
    try:
        place = _place(source, repository, revision, file)
    except RuntimeError as error:  # there is no home folder
        raise OSError(str(error)) from error
    place.parent.mkdir(parents=True, exist_ok=True)
    write_durably(place, json.dumps({**told, "size_bytes": file.size_bytes, "sha256": file.sha256}).encode())


def _place(source: Source, repository: str, revision: str, file: CardFile) -> Path:
    # A digest, as names and revisions hold slashes: with another sign in their place two could have one record.
    name = hashlib.sha256(json.dumps([source, repository, revision, file.name]).encode()).hexdigest()
    return platformdirs.user_data_path("lookonce") / "published" / f"{name}.json"
