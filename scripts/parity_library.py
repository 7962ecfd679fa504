"""The library's side of the comparison: Lookonce's pictures, prompts and native layer over one GGUF pair.

It goes below the public surface for what that does not give: logits at every position and every layer's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from lookonce.embedding import ImageEmbedding
from lookonce.images import QWEN2_VL, QWEN3_VL, Picture, fit, open_picture
from lookonce.native.capture import Capture
from lookonce.native.text import Context, ContextOptions, KvType, TextModel
from lookonce.native.vision import VisionTower
from lookonce.prompt import ChatTemplate, Message, Part, Prompt, TokenRun, assemble
from lookonce.synthetic.shape import Shape

__all__ = ["DEFAULT", "EXACT", "Evaluation", "Library", "Setting"]

_THREADS = 1  # the models are tiny, and ggml's threads wait by spinning: on a busy machine two take far longer


@dataclass(frozen=True, slots=True)
class Setting:
    """How the context is made: type of K and V, flash attention."""

    kv_type: KvType
    flash_attention: bool | None


EXACT = Setting("f32", flash_attention=False)
DEFAULT = Setting("f16", flash_attention=None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one prompt gives: logits (tokens, vocabulary) and each layer's output (tokens, hidden size)."""

    logits: NDArray[np.float32]
    layers: list[NDArray[np.float32]]


class Library:
    """One GGUF pair, loaded by the library."""

    def __init__(self, text: Path, projector: Path, shape: Shape, setting: Setting = EXACT) -> None:
        self._shape = shape
        self._text = TextModel(text)
        self._layers = [f"l_out-{index}" for index in range(shape.text.layers)]
        self._last_block = f"layer_out-{shape.vision.depth - 1}"
        self._captured = Capture(self._layers)
        options = ContextOptions(
            n_ctx=8192,
            threads=_THREADS,
            kv_type=setting.kv_type,
            flash_attention=setting.flash_attention,
            n_outputs=512,
        )
        self._context = Context(self._text, options, self._captured)
        self._tower = VisionTower(projector, self._text, threads=_THREADS, flash_attention=setting.flash_attention)
        self._template = ChatTemplate(self._text.chat_template, bos=self._text.bos, eos=self._text.eos)

    def preprocess(self, picture: NDArray[np.uint8]) -> Picture:
        """Give a picture as the tower gets it."""
        return fit(open_picture(picture), QWEN3_VL if self._shape.family == "qwen3vl" else QWEN2_VL)

    def look(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ImageEmbedding]:
        """Give the tower's tokens before the projector, and the look with F32 rows."""
        fitted = self.preprocess(picture)
        encoded = self._tower.encode(fitted.pixels, [self._last_block])
        width, height = fitted.size
        token = self._shape.vision.patch_size * self._shape.vision.merge_size
        look = ImageEmbedding(
            rows=encoded.rows,
            positions=encoded.positions,
            segments=encoded.segments,
            key=fitted.content_hash(),
            projector="0" * 64,
            projector_name=self._tower.path.name,
            model_name=self._text.path.name,
            grid=(height // token, width // token),
            mrope=self._tower.mrope,
            picture_size=fitted.original_size,
            encoded_size=fitted.size,
            preprocessing=fitted.preprocessing,
            libraries={},
        )
        return encoded.tensors[self._last_block], look

    def render(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Put one user message through the model's chat template."""
        return self._template.render([Message("user", tuple(parts))])

    def prompt(self, parts: Sequence[Part]) -> Prompt:
        """Turn one user message into what is evaluated."""
        return assemble(
            self.render(parts), self._text.tokenize, bos=self._text.bos_token, batch_size=self._context.batch_size
        )

    def evaluate(self, prompt: Prompt) -> Evaluation:
        """Evaluate a prompt from the start, keeping everything."""
        self._captured.clear()
        logits, _ = self._run(prompt, "all")
        return Evaluation(logits, [np.concatenate(self._captured.values[name]) for name in self._layers])

    def generate(self, prompt: Prompt, count: int) -> list[int]:
        """Give the greedy continuation."""
        logits, position = self._run(prompt, "last")
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(int(logits[-1].argmax()))
            self._context.decode_tokens(tokens[-1:], position=position)
            position += 1
            logits = self._context.logits()[None]
        return tokens

    def _run(self, prompt: Prompt, outputs: Literal["last", "all"]) -> tuple[NDArray[np.float32], int]:
        self._context.forget(0)
        logits: list[NDArray[np.float32]] = []
        position, size = 0, self._context.batch_size
        for run in prompt.runs:
            if isinstance(run, TokenRun):
                for first in range(0, len(run.tokens), size):
                    piece = run.tokens[first : first + size]
                    self._context.decode_tokens(piece, position=position, outputs=outputs)
                    position += len(piece)
                    logits += self._kept(len(piece) if outputs == "all" else 1)
            else:
                positions = run.positions + position
                kept: Literal["all", "none"] = "all" if outputs == "all" else "none"
                self._context.decode_rows(run.rows, positions, causal=run.causal, outputs=kept)
                position += run.advance
                logits += self._kept(len(positions) if kept == "all" else 0)
        return np.stack(logits), position

    def _kept(self, count: int) -> list[NDArray[np.float32]]:
        # Counted from the end: with one row kept, its index is the token's place in the batch.
        return [self._context.logits(index) for index in range(-count, 0)]

    def close(self) -> None:
        """Free all native handles; may be called twice."""
        self._tower.close()
        self._context.close()
        self._text.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
