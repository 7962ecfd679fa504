"""What a hub published about a file whose card tells less: its size and SHA-256, kept when the file was fetched.

So that a later look at the file needs no network to know whether it is whole. One small JSON file each, in the user's
data folder: processes that fetch different files do not meet.
"""

import json
from pathlib import Path

import platformdirs

from lookonce.cards import CardFile, ModelCard
from lookonce.durable import write_durably

__all__ = ["complete", "recall", "remember"]


def recall(repository: str, file: CardFile) -> CardFile:
    """Give `file` with its size and hash as they were published, where the card itself has none."""
    if file.sha256 is not None:
        return file
    try:
        told = json.loads(_place(repository, file).read_text("utf-8"))
        size_bytes, sha256 = told["size_bytes"], told["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # never fetched, or torn: it is fetched or checked once more
        return file
    if not isinstance(sha256, str) or file.size_bytes not in (None, size_bytes):
        return file
    return CardFile(file.name, size_bytes, sha256)


def complete(card: ModelCard, file: CardFile) -> CardFile:
    """Give a card's file with what either hub published about it when it was fetched, where the card has none."""
    for repository in filter(None, (card.huggingface, card.modelscope)):
        file = recall(repository, file)
    return file


def remember(repository: str, file: CardFile) -> None:
    """Keep the size and hash of `file`. Raises OSError where they cannot be kept."""
    place = _place(repository, file)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_durably(place, json.dumps({"size_bytes": file.size_bytes, "sha256": file.sha256}).encode())


def _place(repository: str, file: CardFile) -> Path:
    name = f"{repository}/{file.name}".replace("/", "--")
    return platformdirs.user_data_path("lookonce") / "published" / f"{name}.json"
