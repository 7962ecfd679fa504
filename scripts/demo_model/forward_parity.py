"""How far the training's forward pass is from transformers' own, with random weights. Needs torch and transformers."""

from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo_model.checkpoint import SHAPE
from demo_model.network import collate, read, tower_rows
from demo_model.prompt import PromptMaker, TokenSequence
from demo_model.scene import PIXEL_RULE, fitted, grid_of
from demo_model.task import Question
from demo_model.vocabulary import train_vocabulary
from lookonce.drawing import draw
from lookonce.scene import Scene
from lookonce.synthetic.weight import Weights
from parity_reference import make_network, make_tokenizer

__all__ = ["branch_error", "picture_error"]

_QUESTIONS = [
    Question("colour", (("What colour is the star?", "red"),)),
    Question("follow-up", (("Where is the star?", "top left"), ("And what is right of it?", "a blue circle"))),
]


class _Both:
    def __init__(self) -> None:
        vocabulary = train_vocabulary(SHAPE.text.vocab_size)
        tokenizer = make_tokenizer("qwen3vl", vocabulary)
        self.network = make_network(SHAPE, Weights(SHAPE, seed=0), vocabulary)
        self.maker = PromptMaker(
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], vocabulary.id_of("<|image_pad|>")
        )

    def ours(self, sequence: TokenSequence, scenes: tuple[Scene, ...]) -> torch.Tensor:
        pictures = [fitted(scene) for scene in scenes]
        counts = [grid_of(picture)[0] * grid_of(picture)[1] for picture in pictures]
        with torch.no_grad():
            rows, stacked = tower_rows(self.network.model.visual, pictures)
            batch = collate([sequence], counts, self.maker.image_token)
            return read(self.network.model.language_model, batch, rows, stacked)

    def theirs(self, sequence: TokenSequence, scenes: tuple[Scene, ...]) -> torch.Tensor:
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": PIXEL_RULE.min_pixels, "longest_edge": PIXEL_RULE.max_pixels},
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        seen = processor([draw(scenes[number]) for number in sequence.pictures], return_tensors="pt")
        tokens = torch.tensor([sequence.tokens])
        made: dict[str, Any] = {**seen, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        made["mm_token_type_ids"] = (tokens == self.maker.image_token).int()
        with torch.no_grad():
            return self.network.model(**made, use_cache=False).last_hidden_state[0]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def picture_error(first: Scene, second: Scene) -> float:
    """Give the largest difference over a prompt with two pictures inline."""
    both = _Both()
    question = Question("compare", (("Which picture has more shapes, <image_2> or <image_1>?", "the first"),))
    given = [(number, grid_of(fitted(scene))) for number, scene in enumerate((first, second))]
    sequence = both.maker.ask_inline(question, given)
    return _difference(both.ours(sequence, (first, second)), both.theirs(sequence, (first, second)))


def branch_error(scene: Scene) -> float:
    """Give the largest difference between a second branch and its question asked alone through transformers."""
    both = _Both()
    given = [(0, grid_of(fitted(scene)))]
    together, alone = both.maker.ask(_QUESTIONS, given), both.maker.ask(_QUESTIONS[1:], given)
    length = len(alone) - alone.branches.index(1)
    return _difference(both.ours(together, (scene,))[-length:], both.theirs(alone, (scene,))[-length:])
