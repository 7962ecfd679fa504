"""The sizes of the models that can be made, under the names of transformers' configurations.

Knows nothing of weights or files. `tiny` has every part of the architecture that a real model has.
"""

from dataclasses import dataclass

__all__ = ["FAMILIES", "Shape", "TextShape", "VisionShape", "find_shape", "shape_names"]


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a text model."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    mrope_section: tuple[int, int, int]
    rope_theta: float
    vocab_size: int
    context_length: int
    tied: bool
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of a vision tower and its projector.

    `deepstack` and `n_positions` belong to Qwen3-VL; `full_attention` (blocks without windows) to Qwen2.5-VL.
    """

    hidden_size: int
    depth: int
    heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    deepstack: tuple[int, ...] = ()
    n_positions: int = 0
    full_attention: tuple[int, ...] = ()
    window_size: int = 112
    merge_size: int = 2
    temporal_patch_size: int = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A whole model: its family, its name within the family, and both parts."""

    family: str
    name: str
    text: TextShape
    vision: VisionShape


FAMILIES = {"qwen3vl": "Qwen3-VL", "qwen2.5vl": "Qwen2.5-VL"}


def _qwen3_text(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool) -> TextShape:
    return TextShape(hidden, layers, heads, 8, 128, intermediate, (24, 20, 20), 5e6, 151_936, 262_144, tied)


_QWEN3_SMALL_TOWER = VisionShape(1024, 24, 16, 4096, 16, 768, (5, 11, 17), 2304)
_QWEN3_LARGE_TOWER = VisionShape(1152, 27, 16, 4304, 16, 768, (8, 16, 24), 2304)
_QWEN25_TOWER = VisionShape(1280, 32, 16, 3420, 14, 560, full_attention=(7, 15, 23, 31))

# The tiny models leave embeddings and LM head untied: a random tied head mostly repeats its input token.
_SHAPES = (
    Shape(
        "qwen3vl",
        "tiny",
        TextShape(256, 4, 8, 2, 64, 512, (12, 10, 10), 5e6, 512, 32_768, tied=False),
        VisionShape(128, 4, 2, 512, 16, 256, (0, 2), 256),
    ),
    # What train_demo_model.py trains.
    Shape(
        "qwen3vl",
        "demo",
        TextShape(256, 4, 4, 2, 64, 768, (12, 10, 10), 1e4, 560, 8192, tied=True),
        VisionShape(128, 4, 2, 512, 16, 256, (0, 1, 2), 256),
    ),
    Shape("qwen3vl", "2b", _qwen3_text(2048, 28, 16, 6144, tied=True), _QWEN3_SMALL_TOWER),
    Shape("qwen3vl", "4b", _qwen3_text(2560, 36, 32, 9728, tied=True), _QWEN3_SMALL_TOWER),
    Shape("qwen3vl", "8b", _qwen3_text(4096, 36, 32, 12288, tied=False), _QWEN3_LARGE_TOWER),
    Shape(
        "qwen2.5vl",
        "tiny",
        TextShape(256, 4, 4, 2, 64, 512, (8, 12, 12), 1e6, 512, 32_768, tied=False),
        VisionShape(128, 4, 2, 340, 14, 560, full_attention=(1, 3)),
    ),
    Shape(
        "qwen2.5vl",
        "3b",
        TextShape(2048, 36, 16, 2, 128, 11008, (16, 24, 24), 1e6, 151_936, 128_000, tied=True),
        _QWEN25_TOWER,
    ),
    Shape(
        "qwen2.5vl",
        "7b",
        TextShape(3584, 28, 28, 4, 128, 18944, (16, 24, 24), 1e6, 152_064, 128_000, tied=False),
        _QWEN25_TOWER,
    ),
)


def shape_names(family: str) -> tuple[str, ...]:
    """Give the names of a family's shapes, smallest first."""
    return tuple(shape.name for shape in _SHAPES if shape.family == family)


def find_shape(family: str, name: str) -> Shape:
    """Give the shape of that name; a ValueError names those that exist."""
    for shape in _SHAPES:
        if (shape.family, shape.name) == (family, name):
            return shape
    known = ", ".join(f"{shape.family} {shape.name}" for shape in _SHAPES)
    raise ValueError(f"there is no shape {name!r} of family {family!r}; choose one of: {known}")
