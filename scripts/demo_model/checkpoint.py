"""The trained network on disk: as safetensors under transformers' names, and as the two files that Lookonce loads.

Needs neither torch nor transformers.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lookonce.synthetic.pair import write_pair
from lookonce.synthetic.shape import find_shape
from lookonce.synthetic.vocabulary import Vocabulary, build_vocabulary
from lookonce.synthetic.weight import TrainedWeights

__all__ = ["SHAPE", "export_pair", "load_checkpoint", "save_checkpoint"]

SHAPE = find_shape("qwen3vl", "demo")
_NAME = "Lookonce demo"
_WEIGHTS, _MERGES = "model.safetensors", "merges.json"


def save_checkpoint(folder: Path, weights: Mapping[str, NDArray[np.float32]], vocabulary: Vocabulary) -> None:
    """Write weights, without the LM head that is tied to the embeddings, and the vocabulary's merges."""
    save_file({name: values for name, values in weights.items() if name != "lm_head.weight"}, folder / _WEIGHTS)
    (folder / _MERGES).write_text(json.dumps(vocabulary.merges))


def load_checkpoint(folder: Path) -> tuple[dict[str, NDArray[np.float32]], Vocabulary]:
    """Read what `save_checkpoint` wrote."""
    merges = tuple((first, second) for first, second in json.loads((folder / _MERGES).read_text()))
    return load_file(folder / _WEIGHTS), build_vocabulary("qwen3vl", SHAPE.text.vocab_size, merges)


def export_pair(folder: Path, outdir: Path, *, type: str, mmproj_type: str) -> tuple[Path, Path]:
    """Write the two files of the checkpoint in `folder` into `outdir`; Q4_K_M needs llama-cpp-python."""
    weights, vocabulary = load_checkpoint(folder)
    outdir.mkdir(parents=True, exist_ok=True)
    text, projector = outdir / f"lookonce-demo-{type}.gguf", outdir / f"mmproj-lookonce-demo-{mmproj_type}.gguf"
    write_pair(
        text, projector, SHAPE, TrainedWeights(weights), vocabulary, type=type, mmproj_type=mmproj_type, name=_NAME
    )
    return text, projector
