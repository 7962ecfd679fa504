"""Pictures and looks for the tests, seeded, made without a vision tower."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lookonce.embedding import ImageEmbedding, RowSegment, Segment, TextSegment
from lookonce.prompt import Part

WIDTH = 768  # n_embd_inp of the tiny Qwen3-VL
VISION_START, VISION_END = 495, 496  # its tokens
BEGIN, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def make_picture(seed: int, width: int = 64, height: int = 96) -> NDArray[np.uint8]:
    """Noise: no two seeds share a pixel for long."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_look(
    seed: int = 0,
    grid: tuple[int, int] = (2, 3),
    *,
    alias: str | None = None,
    width: int = WIDTH,
    framed: bool = True,
) -> ImageEmbedding:
    """A look of random rows with the positions that Qwen-VL gives a grid of (rows, columns)."""
    rows, columns = grid
    n_rows = rows * columns
    places = [(0, row, column) for row in range(rows) for column in range(columns)]
    picture = RowSegment(n_rows, max(grid), causal=True)
    segments: tuple[Segment, ...] = (picture,)
    if framed:
        segments = (TextSegment((VISION_START,)), picture, TextSegment((VISION_END,)))
    values = np.random.default_rng(seed).standard_normal((n_rows, width)) * 0.5
    return ImageEmbedding(
        rows=values.astype(np.float16),
        positions=np.array(places, dtype=np.int32),
        segments=segments,
        key=hashlib.sha256(f"{seed} {grid}".encode()).hexdigest(),
        projector="0" * 64,
        projector_name="mmproj.gguf",
        model_name="Qwen3-VL tiny seed 0",
        grid=grid,
        mrope=True,
        picture_size=(columns * 32, rows * 32),
        encoded_size=(columns * 32, rows * 32),
        preprocessing="none",
        libraries={},
        alias=alias,
    )


def written(parts: Sequence[Part]) -> str:
    """Rendered parts as the official templates write them."""
    return "".join(part if isinstance(part, str) else "<|vision_start|><|image_pad|><|vision_end|>" for part in parts)
