"""Both files of a model of random weights, made in a folder or found there again."""

import math
import os
from pathlib import Path
from typing import Final

from lookonce.gguf_type import FILE_TYPES
from lookonce.synthetic.gguf_pair import write_projector, write_text
from lookonce.synthetic.shape import FAMILIES, Shape, find_shape
from lookonce.synthetic.vocabulary import Vocabulary, build_vocabulary
from lookonce.synthetic.weight import NamedWeights, Weights

__all__ = ["TEXT_TYPES", "find_pair", "make_pair", "make_weights", "needed_bytes", "write_pair"]

TEXT_TYPES: Final = (*FILE_TYPES, "Q4_K_M")


def make_weights(shape: Shape, seed: int = 0) -> tuple[Weights, Vocabulary]:
    """Give the weights of a model under transformers' names, and the vocabulary that they belong to.

    Greedy answers are readable text: the LM head never prefers special tokens or lone bytes.
    """
    vocabulary = build_vocabulary(shape.family, shape.text.vocab_size)
    return Weights(shape, seed=seed, quiet=vocabulary.unprintable), vocabulary


def find_pair(
    folder: str | Path,
    *,
    family: str = "qwen3vl",
    shape: str = "tiny",
    type: str = "F32",
    mmproj_type: str = "F32",
    seed: int = 0,
) -> tuple[Path, Path] | None:
    """Give the paths of a pair that was made in `folder` before, or None."""
    pair = _paths(Path(folder), family, shape, seed, (type, mmproj_type))
    return pair if all(path.exists() for path in pair) else None


def make_pair(
    folder: str | Path,
    *,
    family: str = "qwen3vl",
    shape: str = "tiny",
    type: str = "F32",
    mmproj_type: str = "F32",
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write both files into `folder` and give their paths: the text model, then the projector file.

    A tiny pair takes a fraction of a second; 2b in Q4_K_M some minutes and 4 GB of disk while it runs. The same
    arguments give the same bytes. Raises ValueError for an unknown family, shape or type.
    """
    sizes = find_shape(family, shape)
    for given, known in ((type, TEXT_TYPES), (mmproj_type, tuple(FILE_TYPES))):
        if given not in known:
            raise ValueError(f"there is no type {given!r} here; choose one of: {', '.join(known)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, vocabulary = make_weights(sizes, seed)
    name = f"{FAMILIES[family]} {shape} seed {seed}"
    text, projector = _paths(folder, family, shape, seed, (type, mmproj_type))
    write_pair(text, projector, sizes, weights, vocabulary, type=type, mmproj_type=mmproj_type, name=name)
    return text, projector


def write_pair(
    text: Path,
    projector: Path,
    sizes: Shape,
    weights: NamedWeights,
    vocabulary: Vocabulary,
    *,
    type: str,
    mmproj_type: str,
    name: str,
) -> None:
    """Write both files of a model, each whole or not at all."""
    write_projector(projector, sizes, weights, type=mmproj_type, name=name)
    if type == "Q4_K_M":
        _write_quantized(text, sizes, weights, vocabulary, name)
    else:
        write_text(text, sizes, weights, vocabulary, type=type, name=name)


def needed_bytes(*, family: str = "qwen3vl", shape: str = "tiny") -> int:
    """About how much disk a pair in Q4_K_M and F16 takes while it is made: the text model is F16 on the way."""
    weights = Weights(find_shape(family, shape), seed=0)
    n_vision = sum(math.prod(weights.shape_of(key)) for key in weights if key.startswith("model.visual."))
    n_text = sum(math.prod(weights.shape_of(key)) for key in weights) - n_vision
    return n_vision * 2 + n_text * 2 + n_text * 5 // 8


def _paths(folder: Path, family: str, shape: str, seed: int, types: tuple[str, str]) -> tuple[Path, Path]:
    stem = f"{FAMILIES[family].replace('3-VL', '3VL')}-{shape}-seed{seed}"
    return folder / f"{stem}-{types[0]}.gguf", folder / f"mmproj-{stem}-{types[1]}.gguf"


def _write_quantized(path: Path, shape: Shape, weights: NamedWeights, vocabulary: Vocabulary, name: str) -> None:
    """Write a Q4_K_M file through libllama's own quantizer."""
    from lookonce.native.quantizer import quantize

    # Above 4b an F16 file on the way would be larger than most disks have to spare.
    before = "Q8_0" if shape.text.hidden_size > 2560 else "F16"
    whole = path.with_name(f".{path.name}.{os.getpid()}.whole")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_text(whole, shape, weights, vocabulary, type=before, name=name)
        quantize(whole, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        whole.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
