"""What is compared: pictures of many sizes, prompts with none, one and three pictures, texts that are hard to split,
and what is embedded.

Needs neither torch nor native code.
"""

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EMBEDDINGS",
    "GOLDEN_PICTURES",
    "GREEDY_TOKENS",
    "PICTURES",
    "PROMPTS",
    "STAGES",
    "TEXTS",
    "EmbeddingCase",
    "PromptCase",
    "batch_texts",
    "pooled",
    "vector_layers",
]

Array = NDArray[np.float32]
Size = tuple[int, int, int]
_Look = TypeVar("_Look")

GREEDY_TOKENS = 24

# Width, height, number.
PICTURES: tuple[Size, ...] = (
    (256, 256, 0),
    (512, 512, 1),
    (257, 255, 2),
    (300, 200, 3),
    (101, 103, 4),
    (640, 480, 5),
    (333, 777, 6),
    (1000, 50, 7),
    (40, 1200, 8),
    (2000, 11, 9),
    (31, 17, 10),
    (5, 3, 11),
    (1, 1, 12),
    (720, 1280, 13),
    (1536, 1024, 14),
)
GOLDEN_PICTURES: tuple[Size, ...] = ((256, 256, 0), (300, 200, 3), (1000, 50, 7), (5, 3, 11))


@dataclass(frozen=True, slots=True)
class PromptCase:
    """One user message: texts, and the sizes of the pictures that stand between them."""

    parts: tuple[str | Size, ...]
    name: str = ""

    @property
    def pictures(self) -> tuple[Size, ...]:
        """The pictures in order."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def question(self) -> str:
        """The message as one text for `Model.ask`, with the automatic alias in each picture's place."""
        numbers = count(1)
        return "".join(part if isinstance(part, str) else f"<image_{next(numbers)}>" for part in self.parts)

    def messages(self) -> list[dict[str, Any]]:
        """Give the conversation as transformers takes it."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in self.parts
        ]
        return [{"role": "user", "content": content}]

    def parts_with(self, looks: Sequence[_Look]) -> list[str | _Look]:
        """Give the message with a look in each picture's place."""
        remaining = iter(looks)
        return [part if isinstance(part, str) else next(remaining) for part in self.parts]


PROMPTS = (
    PromptCase(("What colour is the circle?",), "text"),
    PromptCase(("Describe the red square and the yellow circle. " * 40,), "long text"),
    PromptCase(("é ü 日本 \U0001f642 12345\n\n  of the cat",), "odd text"),
    PromptCase(((300, 200, 3), "Describe the picture."), "one picture"),
    PromptCase(("What is ", (1000, 50, 7), " that wide?"), "one, in the middle"),
    PromptCase(((640, 960, 13), "How many?"), "one, over one batch"),
    PromptCase(((256, 256, 0), (40, 1200, 8), (5, 3, 11), "Compare them."), "three pictures"),
    PromptCase(
        ("Compare ", (257, 255, 2), " with ", (101, 103, 4), " and ", (300, 200, 3), ", please."), "three, apart"
    ),
)

TEXTS = (
    "What colour is the cat?",
    " ",
    "  leading and  double   spaces ",
    "line\nbreaks\n\n\nand\ttabs \r\n end\n",
    "1234567890 3.14159 ½ ² Ⅷ ٣",
    "I've they'RE don'T we'Ll 'S'",
    "héllo wörld naïve ﬁne",
    "日本語のテキスト 你好\uff0c世界",
    "emoji \U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea done",
    "русский العربية हिन्दी ไทย 한국어",
    "decomposed e\u0301 a\u0308 \u1100\u1161, and signs \u212a \u212b",
    "ƒ(x)=∑ᵢ xᵢ² ≤ ∞ !!!???...---",
    "zero\u200bwidth \ufeff \u00a0 \u3000 \u2028 \u0085 \x0b\x0c \x00 \x1f \x7f",
    "İstanbul \u017ftraße it'\u017f ok",
    "<|im_end|> <|endoftext|><|im_start|>x",
    '<tool_call>{"a": 1}</tool_call> <think>\nx\n</think> <tool_response>',
    "<|not_a_token|> <im_end> <| im_end |>",
    "a" * 300,
    "\n",
)


@dataclass(frozen=True, slots=True)
class EmbeddingCase:
    """One thing to embed: pictures by their sizes, a text that may be empty, and an instruction."""

    name: str
    pictures: tuple[Size, ...] = ()
    text: str = ""
    instruction: str | None = None

    def messages(self) -> list[dict[str, Any]]:
        """Give the conversation as QwenLM/Qwen3-VL-Embedding's src/models/qwen3_vl_embedding.py makes it."""
        told = self.instruction or "Represent the user's input."
        content: list[dict[str, str]] = [{"type": "image"} for _ in self.pictures]
        if self.text:
            content.append({"type": "text", "text": self.text})
        told = told if unicodedata.category(told[-1]).startswith("P") else told + "."
        return [
            {"role": "system", "content": [{"type": "text", "text": told}]},
            {"role": "user", "content": content},
        ]


EMBEDDINGS = (
    EmbeddingCase("text", text="What colour is the circle?"),
    EmbeddingCase("text, instructed", text="a red circle", instruction="Find a picture that fits"),
    EmbeddingCase("long text", text="Describe the red square and the yellow circle. " * 40),
    EmbeddingCase("one picture", ((300, 200, 3),)),
    EmbeddingCase("picture + text", ((257, 255, 2),), "What is it?"),
    EmbeddingCase("picture over one batch", ((640, 960, 13),), "How many?"),
    EmbeddingCase("three pictures", ((256, 256, 0), (40, 1200, 8), (5, 3, 11))),
    EmbeddingCase("three + text", ((101, 103, 4), (300, 200, 3), (101, 103, 4)), "Compare them.", "Which differ?"),
)
STAGES = (
    PromptCase(((300, 200, 3), "Describe the image."), "one picture"),
    PromptCase(((333, 777, 6), "Describe the image."), "one, tall"),
    PromptCase(((256, 256, 0), (40, 1200, 8), (5, 3, 11), "Compare them."), "three pictures"),
)

_WORDS = ("red", "blue circle", "a green star", "at the top left", "of a gray picture", "two", "three squares", "cat")


def batch_texts() -> list[str]:
    """Give 64 texts of many lengths, two of them longer than a batch."""
    draw = random.Random(0)
    lengths = [draw.choice((1, 2, 5, 12, 40)) for _ in range(64)]
    lengths[5], lengths[40] = 300, 180
    return [" ".join(draw.choices(_WORDS, k=length)) for length in lengths]


def vector_layers(count: int) -> tuple[int, int, int]:
    """Give the first layer, one in the middle where DeepStack enters if the family has it, and the last."""
    return 0, count // 2 - 1, count - 1


def pooled(states: Array, is_row: NDArray[np.bool_], pooling: str, tokens: str) -> Array:
    """Pool a layer's states, (tokens, width), and divide by the norm."""
    kept = states[{"all": np.ones_like(is_row), "text": ~is_row, "image": is_row}[tokens]].astype(np.float64)
    vector = {"mean": kept.mean(0), "max": kept.max(0), "cls": kept[0], "last": kept[-1]}[pooling]
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)
