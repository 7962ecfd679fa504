"""What the network reads: prompts token for token as Lookonce renders them, several questions sharing one picture.

Knows nothing of torch. A sequence has a trunk and branches: each branch sees the trunk and itself alone, and starts at
the position where the trunk ends, so that it reads what it would read by itself.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt

from .task import ALIASES, Question

__all__ = ["INSTRUCTION", "TRUNK", "PromptMaker", "TokenSequence"]

INSTRUCTION = "Represent the user's input."
TRUNK = 0

_PICTURE = "<|vision_start|>{}<|vision_end|>"
_USER, _ASSISTANT, _END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"

Grid = tuple[int, int]


@dataclass(slots=True)
class TokenSequence:
    """Tokens with their (t, y, x) positions, branches and how much each counts in the loss (0: not learned).

    `pictures` are numbers of the batch's pictures, in the order in which their rows stand.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    questions: list[tuple[str, int, int]] = field(default_factory=list)
    next_position: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Writes sequences. `encode` splits a text with special tokens into ids; `image_token` stands for one row."""

    encode: Callable[[str], Sequence[int]]
    image_token: int

    def ask(self, questions: Sequence[Question], pictures: Sequence[tuple[int, Grid]]) -> TokenSequence:
        """Put questions as branches after a trunk of pictures, given by number and grid."""
        made = TokenSequence()
        self._text(made, _USER, TRUNK)
        for picture in pictures:
            self._picture(made, picture, TRUNK)
        for branch, question in enumerate(questions, start=1):
            self.branch(made, question, branch)
        return made

    def branch(self, made: TokenSequence, question: Question, branch: int) -> None:
        """Add a question whose pictures stand in the trunk."""
        before = made.next_position
        for turn, (text, answer) in enumerate(question.turns):
            self._text(made, (_USER if turn else "") + text, branch)
            self._answer(made, question.task, answer, branch)
            if turn + 1 < len(question.turns):
                self._text(made, "\n", branch)
        made.next_position = before

    def length(self, question: Question) -> int:
        """Say how many tokens a question's branch takes."""
        alone = TokenSequence()
        self.branch(alone, question, 1)
        return len(alone)

    def ask_inline(self, question: Question, pictures: Sequence[tuple[int, Grid]]) -> TokenSequence:
        """Put one question of one turn whose aliases stand for pictures; a picture not named comes first."""
        ((text, answer),) = question.turns
        made = TokenSequence()
        self._text(made, _USER, TRUNK)
        for alias, picture in zip(ALIASES, pictures, strict=True):
            if alias not in text:
                self._picture(made, picture, TRUNK)
        for piece in re.split(f"({'|'.join(ALIASES)})", text):
            if piece in ALIASES:
                self._picture(made, pictures[ALIASES.index(piece)], TRUNK)
            else:
                self._text(made, piece, TRUNK)
        self._answer(made, question.task, answer, TRUNK)
        return made

    def embed(self, content: str | tuple[int, Grid]) -> TokenSequence:
        """Put a caption or a picture under the embedding prompt; its last token's state becomes the vector."""
        made = TokenSequence()
        self._text(made, f"<|im_start|>system\n{INSTRUCTION}{_END}\n{_USER}", TRUNK)
        if isinstance(content, str):
            self._text(made, content, TRUNK)
        else:
            self._picture(made, content, TRUNK)
        self._text(made, f"{_END}\n{_ASSISTANT}", TRUNK)
        return made

    def _answer(self, made: TokenSequence, task: str, answer: str, branch: int) -> None:
        self._text(made, f"{_END}\n{_ASSISTANT}", branch)
        start = len(made)
        count = len(self.encode(answer + _END))
        # Long answers have more to say, but must not drown the short ones.
        self._text(made, answer + _END, branch, weight=1 / sqrt(count))
        made.questions.append((task, start, len(made)))

    def _text(self, made: TokenSequence, text: str, branch: int, weight: float = 0.0) -> None:
        tokens = self.encode(text)
        made.tokens += tokens
        made.positions += [(made.next_position + step,) * 3 for step in range(len(tokens))]
        made.branches += [branch] * len(tokens)
        made.weights += [weight] * len(tokens)
        made.next_position += len(tokens)

    def _picture(self, made: TokenSequence, picture: tuple[int, Grid], branch: int) -> None:
        number, (rows, columns) = picture
        opening, closing = _PICTURE.split("{}")
        self._text(made, opening, branch)
        at = made.next_position
        made.tokens += [self.image_token] * (rows * columns)
        made.positions += [(at, at + row, at + column) for row in range(rows) for column in range(columns)]
        made.branches += [branch] * (rows * columns)
        made.weights += [0.0] * (rows * columns)
        made.pictures.append(number)
        made.next_position = at + max(rows, columns)
        self._text(made, closing, branch)
