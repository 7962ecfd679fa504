"""Score the demo model on held-out scenes: its two files through Lookonce, or its checkpoint through transformers.

Both sit the same exam: the same questions about the same pictures, and captions to be matched with pictures among
128 scenes, and among those with a twin each that differs in one attribute.

    python scripts/score_demo_model.py --model text.gguf --mmproj mmproj.gguf
    python scripts/score_demo_model.py --checkpoint train
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lookonce
from demo_model.exam import Entry, Marks, Matching, make_exam, make_matching, recall
from demo_model.scene import PIXEL_RULE
from lookonce.drawing import draw
from lookonce.scene import Scene

__all__ = ["main", "score_lookonce"]

Vectors = NDArray[np.float32]
_MIN_PIXELS, _MAX_PIXELS = PIXEL_RULE.min_pixels, PIXEL_RULE.max_pixels
_MAX_TOKENS = 80


def score_lookonce(model: lookonce.Model, entries: list[Entry], matching: Matching) -> tuple[Marks, Vectors, Vectors]:
    """Let Lookonce sit the exam; give its marks, and the vectors of pictures and of captions, scenes before twins."""
    marks = Marks()
    for entry in entries:
        _answer(model, entry, marks)
    with lookonce.Embedder(model, min_pixels=_MIN_PIXELS, max_pixels=_MAX_PIXELS) as embedder:
        scenes = (*matching.scenes, *matching.twins)
        pictures = embedder.embed_batch([{"image": _look(model, scene)} for scene in scenes])
        captions = embedder.embed_batch([{"text": text} for text in matching.captions])
    return marks, pictures, captions


def _look(model: lookonce.Model, scene: Scene) -> lookonce.ImageEmbedding:
    return model.look(draw(scene), min_pixels=_MIN_PIXELS, max_pixels=_MAX_PIXELS)


def _answer(model: lookonce.Model, entry: Entry, marks: Marks) -> None:
    chat = model.chat([_look(model, scene) for scene in entry.scenes])
    for text, expected in entry.question.turns:
        reply = chat.ask(text, temperature=0.0, max_tokens=_MAX_TOKENS)
        marks.add(entry.question.task, text, reply.text, expected)


def _report(marks: Marks, matching: Matching, pictures: Vectors, captions: Vectors) -> dict[str, object]:
    count = len(matching.scenes)
    return {
        "right": round(marks.overall, 4),
        "questions": sum(marks.given.values()),
        "by task": {task: round(share, 4) for task, share in marks.by_task.items()},
        "recall": {
            f"picture to caption, {count}": round(recall(pictures[:count], captions[:count]), 4),
            f"caption to picture, {count}": round(recall(captions[:count], pictures[:count]), 4),
            f"picture to caption, {2 * count} with twins": round(recall(pictures, captions), 4),
            f"caption to picture, {2 * count} with twins": round(recall(captions, pictures), 4),
        },
    }


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, help="text model, with --mmproj, to score through Lookonce")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="folder of train_demo_model.py, to score through transformers")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=128, help="scenes to be matched with captions")
    parser.add_argument("--seed", default="held out", help="name of the exam; training uses none of these scenes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, help="how many wrong answers to print")
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.checkpoint is None):
        parser.error("give either --model and --mmproj, or --checkpoint")
    return options


def main(arguments: list[str]) -> int:
    """Run the command line; the scores go to stdout as JSON."""
    options = _parse(arguments)
    entries, matching = make_exam(options.seed, options.scenes), make_matching(options.seed, options.pairs)
    started = time.monotonic()
    if options.checkpoint is not None:
        from demo_model.reference import score_checkpoint

        marks, pictures, captions = score_checkpoint(options.checkpoint, entries, matching)
    else:
        with (
            tempfile.TemporaryDirectory() as store,
            lookonce.load(options.model, mmproj=options.mmproj, threads=options.threads, store=store) as model,
        ):
            marks, pictures, captions = score_lookonce(model, entries, matching)
    print(json.dumps(_report(marks, matching, pictures, captions), indent=2))
    for text, expected, answer in marks.wrong[: options.show]:
        print(f"{text!r}: {answer!r}, expected {expected!r}", file=sys.stderr)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
