"""Write a text GGUF and a projector GGUF with seeded random weights, for tests and benchmarks.

The files are what llama.cpp's converter and quantizer would write for a model of that shape, so that speed,
memory and fidelity can be measured without a download. The same arguments give the same bytes.

    python scripts/make_model.py models --family qwen3vl --shape 2b --type Q4_K_M --mmproj-type F16
"""

import argparse
import ctypes
import os
import sys
from pathlib import Path

from model_maker.gguf_pair import FILE_TYPES, write_projector, write_text
from model_maker.shape import FAMILIES, Shape, find_shape, shape_names
from model_maker.vocabulary import Vocabulary, build_vocabulary
from model_maker.weight import NamedWeights, Weights

__all__ = ["TEXT_TYPES", "make_pair", "make_weights", "write_pair"]

TEXT_TYPES = (*FILE_TYPES, "Q4_K_M")


def make_weights(shape: Shape, seed: int = 0) -> tuple[Weights, Vocabulary]:
    """Give the weights of a model under transformers' names, and the vocabulary that they belong to.

    Greedy answers are readable text: the LM head never prefers special tokens or lone bytes.
    """
    vocabulary = build_vocabulary(shape.family, shape.text.vocab_size)
    return Weights(shape, seed=seed, quiet=vocabulary.unprintable), vocabulary


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

    A tiny pair takes a fraction of a second; 2b in Q4_K_M some minutes and 4 GB of disk while it runs.
    """
    sizes = find_shape(family, shape)
    for given, known in ((type, TEXT_TYPES), (mmproj_type, tuple(FILE_TYPES))):
        if given not in known:
            raise ValueError(f"there is no type {given!r} here; choose one of: {', '.join(known)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, vocabulary = make_weights(sizes, seed)
    name = f"{FAMILIES[family]} {shape} seed {seed}"
    stem = f"{FAMILIES[family].replace('3-VL', '3VL')}-{shape}-seed{seed}"
    text, projector = folder / f"{stem}-{type}.gguf", folder / f"mmproj-{stem}-{mmproj_type}.gguf"
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


def _write_quantized(path: Path, shape: Shape, weights: NamedWeights, vocabulary: Vocabulary, name: str) -> None:
    """Write a Q4_K_M file through libllama's own quantizer."""
    # Above 4b an F16 file on the way would be larger than most disks have to spare.
    before = "Q8_0" if shape.text.hidden_size > 2560 else "F16"
    whole = path.with_name(f".{path.name}.{os.getpid()}.whole")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_text(whole, shape, weights, vocabulary, type=before, name=name)
        _quantize(whole, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        whole.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def _quantize(source: Path, target: Path) -> None:
    from llama_cpp import llama_cpp as native

    quiet = native.llama_log_callback(lambda level, text, data: None)  # the quantizer prints a line a tensor
    before, data = native.llama_log_callback(0), ctypes.c_void_p()
    native.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    native.llama_log_set(quiet, ctypes.c_void_p(0))
    try:
        params = native.llama_model_quantize_default_params()
        params.ftype = native.LLAMA_FTYPE_MOSTLY_Q4_K_M
        params.allow_requantize = True
        status = native.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    finally:
        native.llama_log_set(before, data)
    if status != 0:
        raise RuntimeError(f"libllama's quantizer gave status {status} for {source}; is the disk full?")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("outdir", type=Path, help="folder for the two files; made if missing")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3vl")
    shapes = "; ".join(f"{family}: {', '.join(shape_names(family))}" for family in FAMILIES)
    parser.add_argument("--shape", default="tiny", help=shapes)
    parser.add_argument("--type", choices=TEXT_TYPES, default="F32", help="type of the text model")
    parser.add_argument("--mmproj-type", choices=list(FILE_TYPES), default="F32", help="type of the projector")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command line; the two paths go to stdout."""
    options = _parse(arguments)
    try:
        paths = make_pair(
            options.outdir,
            family=options.family,
            shape=options.shape,
            type=options.type,
            mmproj_type=options.mmproj_type,
            seed=options.seed,
        )
    except (ValueError, OSError) as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
