"""Cards for the tests, in a file of the user's own, for files that are really there."""

import hashlib
from pathlib import Path

from lookonce.cards import ModelCard, find_card


def write_card(
    path: Path, text: Path, projector: Path, *, name: str = "tiny", family: str = "qwen3vl", **fields: object
) -> ModelCard:
    """Add to `path`, which LOOKONCE_MODELS names, a card for two files, with their sizes and hashes, and read it."""
    options: dict[str, object] = {"huggingface": "me/Tiny.GGUF", "modelscope": "us/Tiny.GGUF", **fields}
    lines = [f"[{name}]", f'family = "{family}"', 'licence = "MIT"']
    lines += [f"{key} = {value!r}" for key, value in options.items() if value is not None]
    for kind, type_, file in (("text", "F32", text), ("projector", "F32", projector)):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        lines += [
            f"[{name}.{kind}]",
            f'{type_} = {{ file = "{file.name}", size_bytes = {file.stat().st_size}, sha256 = "{sha256}" }}',
        ]
    with path.open("a") as out:
        out.write("\n".join(lines) + "\n")
    card = find_card(name)
    assert card is not None
    return card
