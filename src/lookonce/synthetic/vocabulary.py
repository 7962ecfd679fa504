"""A byte-level BPE vocabulary in Qwen's form: 256 byte tokens, merges, special tokens, unused ids.

Knows nothing of weights or files. Large vocabularies give the special tokens their official ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

__all__ = ["Vocabulary", "build_vocabulary", "byte_alphabet"]

_CONTROL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
_TOOL = "<tool_call> </tool_call>"
_FILL_IN_MIDDLE = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
_QWEN3 = "<tool_response> </tool_response> <think> </think>"
_FIRST_SPECIAL_ID = 151_643

_WORDS = (
    "the é ü 日 你 я in er on at is and an ing system user assistant You are a helpful picture image Describe describe "
    "What what colour color red green blue yellow white black square circle triangle left right top bottom above below "
    "of this Compare with How many there how that one two three cat dog you it for to from between Picture ..."
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, the merges in order, and which ids are what.

    `control` are special tokens that never stand for their text, `user_defined` are added tokens that do,
    `unused` fill up to the width of the embedding matrix.
    """

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    control: frozenset[int]
    user_defined: frozenset[int]
    unused: frozenset[int]

    def id_of(self, token: str) -> int:
        """Give a token's id; a ValueError if the vocabulary lacks it."""
        return self.tokens.index(token)

    @property
    def unprintable(self) -> tuple[int, ...]:
        """Give the ids that are not readable text by themselves: special and unused ids, lone bytes."""
        byte_of = {shown: byte for byte, shown in byte_alphabet().items()}
        added = self.control | self.user_defined | self.unused
        return tuple(
            index for index, token in enumerate(self.tokens) if index in added or not _is_readable(token, byte_of)
        )


def byte_alphabet() -> dict[int, str]:
    """Give GPT-2's printable stand-in for every byte, in the order of its vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {
        **{byte: chr(byte) for byte in shown},
        **{byte: chr(256 + place) for place, byte in enumerate(hidden)},
    }


def build_vocabulary(family: str, size: int, merges: tuple[tuple[str, str], ...] | None = None) -> Vocabulary:
    """Build a vocabulary of exactly `size` ids for a family; the same ids for the same arguments.

    `merges` are trained ones, in place of those of common words; ids that they leave over are unused.
    """
    added = [_CONTROL, _TOOL, _FILL_IN_MIDDLE, *([_QWEN3] if family == "qwen3vl" else [])]
    specials = " ".join(added).split()
    n_regular = _FIRST_SPECIAL_ID if size > _FIRST_SPECIAL_ID else size - len(specials)
    alphabet = list(byte_alphabet().values())
    merges = _merges(n_regular - len(alphabet), alphabet) if merges is None else merges
    n_regular = len(alphabet) + len(merges) if n_regular != _FIRST_SPECIAL_ID else n_regular
    tokens = [*alphabet, *(first + second for first, second in merges), *specials]
    control = {n_regular + place for place, token in enumerate(specials) if token.startswith("<|")}
    unused = range(len(tokens), size)
    return Vocabulary(
        tokens=(*tokens, *(f"[PAD{index}]" for index in unused)),
        merges=merges,
        control=frozenset(control),
        user_defined=frozenset(range(n_regular, n_regular + len(specials))) - frozenset(control),
        unused=frozenset(unused),
    )


def _is_readable(token: str, byte_of: dict[str, int]) -> bool:
    try:
        text = bytes(byte_of[character] for character in token).decode()
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character == "\n" for character in text)


def _merges(count: int, alphabet: list[str]) -> tuple[tuple[str, str], ...]:
    """Give `count` merges that make distinct tokens: those of common words, then filler."""
    made: dict[str, tuple[str, str]] = {}
    known = set(alphabet)
    for first, second in _candidates(alphabet):
        if len(made) == count:
            break
        if first + second not in known:
            known.add(first + second)
            made[first + second] = (first, second)
    return tuple(made.values())


def _candidates(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    shown = byte_alphabet()
    for word in _WORDS.split():
        for text in (word, " " + word):
            pieces = [shown[byte] for byte in text.encode()]
            for end in range(1, len(pieces)):
                yield "".join(pieces[:end]), pieces[end]
    yield from product(alphabet, alphabet)
    # By now every pair of bytes is a token, so that these merges are as reachable as real ones.
    for first, second, third in product(alphabet, repeat=3):
        yield first + second, third
