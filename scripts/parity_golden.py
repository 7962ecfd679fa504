"""The golden arrays: what transformers gives for the tiny models, small enough to keep beside the tests.

Reading needs numpy alone; writing is given a reference.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parity_case import (
    EMBEDDINGS,
    GOLDEN_PICTURES,
    GREEDY_TOKENS,
    PROMPTS,
    STAGES,
    TEXTS,
    EmbeddingCase,
    PromptCase,
    pooled,
    vector_layers,
)
from parity_picture import make_picture

if TYPE_CHECKING:
    from parity_reference import Reference

__all__ = [
    "KEPT_VALUES",
    "Golden",
    "GoldenPicture",
    "GoldenPrompt",
    "GoldenStages",
    "GoldenVectors",
    "golden_path",
    "read",
    "write",
]

KEPT_VALUES = 24  # of each unit vector, the first
_KEPT_ROWS = 10
_KEPT_STATES = 4
_POOLINGS = ("mean", "last", "cls", "max")


@dataclass(frozen=True, slots=True, eq=False)
class GoldenPicture:
    """One picture: SHA-256 of its resized pixels, grid, every row's norm, and some rows with their places."""

    size: tuple[int, int, int]
    pixels: str
    grid: tuple[int, int]
    norms: NDArray[np.float32]
    places: NDArray[np.int32]
    rows: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class GoldenPrompt:
    """One prompt: logits after its last token, the greedy tokens that follow, and their text."""

    case: PromptCase
    logits: NDArray[np.float32]
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class GoldenVectors:
    """One embedded case: its token ids, and the beginnings of its unit vectors by layer and pooling."""

    name: str
    tokens: tuple[int, ...]
    vectors: dict[tuple[int, str], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class GoldenStages:
    """One extraction: where the image tokens stand, shapes, and some rows of the tower's tokens and hidden states."""

    case: PromptCase
    image_places: NDArray[np.int32]
    shapes: dict[str, tuple[int, ...]]
    tower_places: NDArray[np.int32]
    tower: NDArray[np.float32]
    hidden_places: NDArray[np.int32]
    hidden: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """All of one family; `texts` holds each text with its token ids, chat template included."""

    pictures: tuple[GoldenPicture, ...]
    prompts: tuple[GoldenPrompt, ...]
    texts: tuple[tuple[str, tuple[int, ...]], ...]
    vectors: tuple[GoldenVectors, ...]
    stages: tuple[GoldenStages, ...]


def golden_path(family: str) -> Path:
    """Give where a family's arrays are kept."""
    return Path(__file__).parent.parent / "tests" / "data" / f"golden-{family}.npz"


def write(path: Path, reference: "Reference") -> None:
    """Write a family's arrays, whole or not at all."""
    arrays: dict[str, NDArray[Any]] = {}
    facts = {
        "pictures": [_write_picture(index, size, reference, arrays) for index, size in enumerate(GOLDEN_PICTURES)],
        "prompts": [_write_prompt(index, case, reference, arrays) for index, case in enumerate(PROMPTS)],
        "texts": [[text, reference.tokenize(reference.render(PromptCase((text,)).messages()))] for text in TEXTS],
        "vectors": [_write_vectors(index, case, reference, arrays) for index, case in enumerate(EMBEDDINGS)],
        "stages": [_write_stages(index, case, reference, arrays) for index, case in enumerate(STAGES)],
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_picture(
    index: int, size: tuple[int, int, int], reference: "Reference", arrays: dict[str, NDArray[Any]]
) -> dict[str, object]:
    picture = make_picture(*size)
    pixels, _, grid = reference.preprocess(picture)
    _, rows = reference.look(picture)
    places = np.linspace(0, len(rows) - 1, _KEPT_ROWS).astype(np.int32)
    arrays[f"norms{index}"] = np.linalg.norm(rows, axis=1).astype(np.float32)
    arrays[f"places{index}"] = places
    arrays[f"rows{index}"] = rows[places]
    return {"size": size, "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(), "grid": grid}


def _write_prompt(
    index: int, case: PromptCase, reference: "Reference", arrays: dict[str, NDArray[Any]]
) -> dict[str, object]:
    pictures = [make_picture(*size) for size in case.pictures]
    ids = reference.tokenize(reference.render(case.messages()), pictures)
    arrays[f"logits{index}"] = reference.evaluate(ids, pictures).logits[-1]
    tokens = reference.generate(ids, pictures, GREEDY_TOKENS)
    return {"name": case.name, "parts": case.parts, "tokens": tokens, "text": reference.decode(tokens)}


def _write_vectors(
    index: int, case: EmbeddingCase, reference: "Reference", arrays: dict[str, NDArray[Any]]
) -> dict[str, object]:
    pictures = [make_picture(*size) for size in case.pictures]
    tokens = reference.tokenize(reference.render(case.messages()), pictures)
    states = reference.hidden_states(tokens, pictures)
    is_row = np.array(tokens) == reference.image_token
    layers = vector_layers(len(states) - 1)
    vectors = [[pooled(states[layer + 1], is_row, pooling, "all") for pooling in _POOLINGS] for layer in layers]
    arrays[f"vectors{index}"] = np.array(vectors, dtype=np.float32)[..., :KEPT_VALUES]
    return {"name": case.name, "tokens": tokens, "layers": layers}


def _write_stages(
    index: int, case: PromptCase, reference: "Reference", arrays: dict[str, NDArray[Any]]
) -> dict[str, object]:
    pictures = [make_picture(*size) for size in case.pictures]
    tokens = reference.tokenize(reference.render(case.messages()), pictures)
    tower = np.concatenate([reference.look(picture)[0] for picture in pictures])
    hidden = reference.hidden_states(tokens, pictures)[-1]
    arrays[f"image_places{index}"] = np.flatnonzero(np.array(tokens) == reference.image_token).astype(np.int32)
    for name, values in {"tower": tower, "hidden": hidden}.items():
        places = np.linspace(0, len(values) - 1, _KEPT_STATES).astype(np.int32)
        arrays[f"{name}_places{index}"] = places
        arrays[f"{name}{index}"] = values[places]
    shapes = {"vision_tokens": tower.shape, "lm_last_hidden": (1, *hidden.shape)}
    return {"name": case.name, "parts": case.parts, "shapes": shapes}


def read(path: Path) -> Golden:
    """Read a family's arrays."""
    with np.load(path, allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        pictures = tuple(
            GoldenPicture(
                tuple(fact["size"]),
                fact["pixels"],
                tuple(fact["grid"]),
                arrays[f"norms{index}"],
                arrays[f"places{index}"],
                arrays[f"rows{index}"],
            )
            for index, fact in enumerate(facts["pictures"])
        )
        prompts = tuple(
            GoldenPrompt(_read_case(fact), arrays[f"logits{index}"], tuple(fact["tokens"]), fact["text"])
            for index, fact in enumerate(facts["prompts"])
        )
        vectors = tuple(
            GoldenVectors(
                fact["name"],
                tuple(fact["tokens"]),
                {
                    (layer, pooling): arrays[f"vectors{index}"][row, column]
                    for row, layer in enumerate(fact["layers"])
                    for column, pooling in enumerate(_POOLINGS)
                },
            )
            for index, fact in enumerate(facts["vectors"])
        )
        names = ("tower_places", "tower", "hidden_places", "hidden")
        stages = tuple(
            GoldenStages(
                _read_case(fact),
                arrays[f"image_places{index}"],
                {name: tuple(shape) for name, shape in fact["shapes"].items()},
                *(arrays[f"{name}{index}"] for name in names),
            )
            for index, fact in enumerate(facts["stages"])
        )
    return Golden(pictures, prompts, tuple((text, tuple(ids)) for text, ids in facts["texts"]), vectors, stages)


def _read_case(fact: dict[str, Any]) -> PromptCase:
    return PromptCase(tuple(part if isinstance(part, str) else tuple(part) for part in fact["parts"]), fact["name"])
