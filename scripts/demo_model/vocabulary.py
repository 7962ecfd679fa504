"""The demo model's vocabulary: byte-level BPE trained on the very texts of its tasks.

Needs the tokenizers library. The same seed gives the same vocabulary.
"""

import json
import random
from collections.abc import Iterator

import tokenizers  # type: ignore[import-not-found,unused-ignore]

from lookonce.scene import caption
from lookonce.synthetic.vocabulary import Vocabulary, build_vocabulary, byte_alphabet
from parity_reference import QWEN_SPLIT

from .prompt import INSTRUCTION
from .scene import make_scene
from .task import TASKS, ask, ask_blind, ask_pair

__all__ = ["train_vocabulary"]

_N_SCENES = 4000


def train_vocabulary(size: int) -> Vocabulary:
    """Train merges on captions, questions and answers, and build a vocabulary of `size` ids."""
    untrained = build_vocabulary("qwen3vl", size)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - len(untrained.control | untrained.user_defined),
        initial_alphabet=list(byte_alphabet().values()),
        min_frequency=2,
        show_progress=False,
    )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.train_from_iterator(_texts(), trainer)
    merges = tuple((first, second) for first, second in json.loads(backend.to_str())["model"]["merges"])
    return build_vocabulary("qwen3vl", size, merges)


def _texts() -> Iterator[str]:
    rng = random.Random("vocabulary")
    yield from ("system\n", "user\n", "assistant\n", INSTRUCTION, "\n") * _N_SCENES
    for _ in range(_N_SCENES):
        scene, other = make_scene(rng), make_scene(rng)
        yield caption(scene)
        questions = [ask(rng, scene, task) for task in TASKS[:-1]]
        questions += [ask_pair(rng, scene, other, inline=inline) for inline in (False, True)]
        for question in (*questions, ask_blind(rng)):
            for turn in question.turns if question else ():
                yield from turn
