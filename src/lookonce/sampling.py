"""How the next token is chosen: the options, checked. The sampling itself is `native/sampler.py`'s."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from typing_extensions import TypedDict

from lookonce.errors import PromptError


class SamplingOptions(TypedDict, total=False):
    """The keyword options that `Model.ask` and `Chat.ask` take; `Sampling` says what each means."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | list[str] | tuple[str, ...]
    json_schema: Mapping[str, Any] | str | None
    grammar: str | None


def refuse_unknown(options: Mapping[str, Any], *others: str) -> None:
    """Raise TypeError, as Python does, for a name that is none of `SamplingOptions` or of `others` beside them."""
    known = [*SamplingOptions.__annotations__, *others]
    for name in options:
        if name not in known:
            # Near enough for a slip of the pen alone: `system` is no misspelt `stream`.
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.78)
            perhaps = f", perhaps {near[0]} is meant" if near else ""
            raise TypeError(f"there is no option {name!r}{perhaps}: choose from {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is generated. The defaults are those that Qwen publishes for its vision-language models.

    max_tokens: how many tokens at most; None goes on until the context is full.
    temperature: 0 takes the likeliest token each time, and the options of chance mean nothing.
    top_p, top_k, min_p: which tokens stay in the draw; 1, 0 and 0 leave all.
    repeat_penalty: divides the logits of tokens among the last 64; 1 is off.
    seed: makes a draw repeatable; None draws a new one.
    stop: texts that end the reply, and are not part of it.
    json_schema: a JSON schema (a mapping or its text) that the reply will satisfy.
    grammar: a GBNF grammar with a rule `root` that the reply will follow.

    Raises PromptError for a value outside these ranges.
    """

    max_tokens: int | None = 1024
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            self._check_whole("max_tokens", 1, 2**31 - 1)
        self._check_whole("top_k", 0, 2**31 - 1)
        if self.seed is not None:
            self._check_whole("seed", 0, 2**32 - 2)  # 2**32 - 1 is llama.cpp's own "draw one"
        self._check_number("temperature", 0.0, 100.0)
        self._check_number("top_p", 0.0, 1.0)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repeat_penalty", 0.01, 100.0)
        if self.json_schema is not None and self.grammar is not None:
            raise PromptError("json_schema and grammar were both given: give one of them")
        if self.grammar is not None and not isinstance(self.grammar, str):
            raise PromptError(f"grammar is a {type(self.grammar).__name__}: give GBNF as a text")
        stops_listed = isinstance(self.stop, str | list | tuple)
        if not stops_listed or not all(isinstance(text, str) and text for text in self.stop_texts):
            raise PromptError(f"stop is {self.stop!r}: give a text or several, none of them empty")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_grammar(self) -> bool:
        """Whether a schema or a grammar decides what may be written."""
        return self.json_schema is not None or self.grammar is not None

    @property
    def schema_text(self) -> str | None:
        """The JSON schema as text. Raises PromptError where it is not JSON."""
        if self.json_schema is None:
            return None
        try:
            if isinstance(self.json_schema, str):
                json.loads(self.json_schema)
                return self.json_schema
            return json.dumps(self.json_schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(
                f"json_schema is not JSON ({error}): give a JSON schema as a mapping or its text"
            ) from error

    def _check_whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            raise PromptError(f"{name} is {value!r}: give a whole number from {low} to {high}")

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        # Compared as it is: float() of a huge int overflows, and NaN lies in no range.
        if isinstance(value, bool) or not isinstance(value, Real) or not (value >= low and value <= high):  # type: ignore[operator]
            raise PromptError(f"{name} is {str(value)[:40]}: give a number from {low:g} to {high:g}")
