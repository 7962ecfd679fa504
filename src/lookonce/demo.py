"""The demonstration: one picture looked at cold, then asked about again without the vision tower.

Knows nothing of where its lines go.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lookonce.drawing import draw_scene
from lookonce.errors import InputError
from lookonce.images import open_picture, read_source
from lookonce.model import Model
from lookonce.reply import Reply
from lookonce.store import Store

__all__ = ["DemoResult", "open_or_draw", "run_demo"]

_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both rounds' replies; `tower_spared` says that the second was answered with no tower loaded."""

    cold: Reply
    stored: Reply
    tower_spared: bool

    @property
    def passed(self) -> bool:
        """Whether the two answers are the same text, the second without a tower."""
        return self.cold.text == self.stored.text and self.tower_spared

    def verdict(self) -> list[str]:
        """Give the lines that sum the demonstration up."""
        if not self.passed:
            return ["", "The answers differ, or the tower was loaded again: please report this, it is a fault."]
        return [
            "",
            f"Both answers are the same. The look took {self.cold.timings.look_s:.3f} s the first time, "
            f"{self.stored.timings.look_s:.3f} s the second.",
            "",
            "Try next, with a model that knows the world:",
            "  lookonce pull qwen3-vl-2b-instruct",
            '  lookonce ask "What is this?" -i photo.jpg --model qwen3-vl-2b-instruct',
            "  lookonce look photo.jpg --output photo.safetensors --model qwen3-vl-2b-instruct",
            '  lookonce ask "And what else?" -i photo.safetensors --model qwen3-vl-2b-instruct',
        ]


def open_or_draw(image: str | None, save_picture: Path | None) -> Image.Image:
    """Open the picture file, or draw shapes; `save_picture` is where to put a copy as PNG. Raises InputError."""
    if save_picture is not None and save_picture.suffix.lower() != ".png":
        raise InputError(f"{str(save_picture)!r} is no name for the picture: end it in .png")
    drawn = draw_scene() if image is None else Image.fromarray(open_picture(read_source(image), image).pixels)
    if save_picture is not None:
        try:
            drawn.save(save_picture)
        except OSError as error:
            raise InputError(f"{str(save_picture)!r} cannot be written: {error.strerror or error}") from error
    return drawn


def run_demo(
    load: Callable[[Store], Model], picture: Image.Image, prompt: str, say: Callable[[str], None]
) -> DemoResult:
    """Ask about a picture with an empty store, then once more with a newly loaded model and what the store kept.

    The store lies in a temporary folder, which is gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="lookonce-demo-") as folder, Store(Path(folder)) as store:
        title = "1. A first look: the vision tower has to work."
        cold, _ = _ask(load, store, picture, prompt, title, say=say)
        title = "\n2. The model loaded anew, the same picture: the store knows it."
        stored, tower_loaded = _ask(load, store, picture, prompt, title, say=say)
    return DemoResult(cold, stored, not tower_loaded)


def _ask(
    load: Callable[[Store], Model],
    store: Store,
    picture: Image.Image,
    prompt: str,
    title: str,
    *,
    say: Callable[[str], None],
) -> tuple[Reply, bool]:
    started = time.perf_counter()
    with load(store) as model:
        loaded_s = time.perf_counter() - started
        say(title)
        reply = model.ask(prompt, images=[picture], temperature=0.0, max_tokens=_MAX_TOKENS)
        tower_loaded = model.tower_loaded
    image, times = reply.images[0], reply.timings
    say(f"   model loaded   {loaded_s:8.3f} s")
    where = "read from the store, no tower loaded" if not tower_loaded else "encoded by the vision tower"
    say(f"   look           {times.look_s:8.3f} s  {image.rows} rows, {where}")
    say(f"   prompt read    {times.prefill_s:8.3f} s  {reply.usage.text_tokens} tokens and {image.rows} rows")
    say(f"   answer         {times.generation_s:8.3f} s  {reply.usage.generated} tokens")
    say(f"   {reply.text.strip()!r}")
    return reply, tower_loaded
