"""The demo model's checkpoint examined through transformers.

The exam goes through transformers' own forward pass, prompts and picture processor, not through training's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lookonce.drawing import draw
from lookonce.scene import Scene
from parity_reference import make_network, make_tokenizer

from .checkpoint import SHAPE, load_checkpoint
from .exam import Entry, Marks, Matching
from .prompt import INSTRUCTION
from .scene import PIXEL_RULE
from .task import ALIASES

__all__ = ["score_checkpoint"]


class _Examinee:
    def __init__(self, folder: Path) -> None:
        weights, vocabulary = load_checkpoint(folder)
        self.network = make_network(SHAPE, weights, vocabulary)
        self.tokenizer = make_tokenizer("qwen3vl", vocabulary)
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": PIXEL_RULE.min_pixels, "longest_edge": PIXEL_RULE.max_pixels},
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            resample=Image.Resampling.BICUBIC,
        )
        self.image_token = vocabulary.id_of("<|image_pad|>")
        self.end = vocabulary.id_of("<|im_end|>")

    def inputs(self, messages: list[dict[str, Any]], scenes: list[Scene]) -> dict[str, Any]:
        """Give transformers' inputs for a conversation, its pictures in the order in which they stand."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        made: dict[str, Any] = {}
        counts: list[int] = []
        if scenes:
            made = dict(self.processor([draw(scene) for scene in scenes], return_tensors="pt"))
            counts = (made["image_grid_thw"].prod(-1) // 4).tolist()
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += [token] * (counts.pop(0) if token == self.image_token else 1)
        tokens = torch.tensor([ids])
        made |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if scenes:
            made["mm_token_type_ids"] = (tokens == self.image_token).int()
        return made

    def answer(self, messages: list[dict[str, Any]], scenes: list[Scene], expected: str) -> str:
        """Give the greedy answer where it is the expected one; else what is likeliest beside each expected token.

        An answer is exact just where each of its tokens is the likeliest after those before it: one pass tells.
        """
        made = self.inputs(messages, scenes)
        answer = [*self.tokenizer(expected, add_special_tokens=False)["input_ids"], self.end]
        ids = torch.cat([made["input_ids"], torch.tensor([answer])], dim=1)
        made |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if scenes:
            made["mm_token_type_ids"] = (ids == self.image_token).int()
        logits = self.network(**made, use_cache=False).logits[0, -len(answer) - 1 : -1]
        told: list[int] = logits.argmax(-1).tolist()
        return str(self.tokenizer.decode(told[:-1] if told[-1] == self.end else told))

    def vector(self, messages: list[dict[str, Any]], scenes: list[Scene]) -> NDArray[np.float32]:
        """Give the normalised last hidden state of a prompt."""
        made = self.inputs(messages, scenes)
        last = self.network.model(**made, use_cache=False).last_hidden_state[0, -1]
        return np.asarray(functional.normalize(last, dim=-1).numpy(), dtype=np.float32)


def _message(role: str, *parts: str | None) -> dict[str, Any]:
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def _first_turn(entry: Entry) -> tuple[dict[str, Any], list[Scene]]:
    text = entry.question.turns[0][0]
    before = [scene for scene, alias in zip(entry.scenes, ALIASES, strict=False) if alias not in text]
    parts: list[str | None] = [None] * len(before)
    order = list(before)
    while found := min((alias for alias in ALIASES if alias in text), key=text.index, default=None):
        piece, _, text = text.partition(found)
        parts += [piece, None]
        order.append(entry.scenes[ALIASES.index(found)])
    return _message("user", *parts, text), order


def score_checkpoint(
    folder: Path, entries: list[Entry], matching: Matching
) -> tuple[Marks, NDArray[np.float32], NDArray[np.float32]]:
    """Let transformers sit the exam, as `score_demo_model.score_lookonce` lets Lookonce."""
    torch.set_num_threads(1)
    examinee, marks = _Examinee(folder), Marks()
    system = _message("system", INSTRUCTION)
    with torch.inference_mode():
        for entry in entries:
            _answer(examinee, entry, marks)
        pictures = [
            examinee.vector([system, _message("user", None)], [scene]) for scene in (*matching.scenes, *matching.twins)
        ]
        captions = [examinee.vector([system, _message("user", text)], []) for text in matching.captions]
    return marks, np.stack(pictures), np.stack(captions)


def _answer(examinee: _Examinee, entry: Entry, marks: Marks) -> None:
    first, scenes = _first_turn(entry)
    messages = [first]
    for turn, (text, expected) in enumerate(entry.question.turns):
        if turn:
            messages.append(_message("user", text))
        marks.add(entry.question.task, text, examinee.answer(messages, scenes, expected), expected)
        messages.append(_message("assistant", expected))
