"""Choosing the next token: libllama's sampler chain, and its grammar beside it."""

import ctypes
import json
import os
import re
import struct
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final

import llama_cpp.llama_cpp as llama
import numpy as np
from llama_cpp.llama_grammar import json_schema_to_gbnf
from numpy.typing import NDArray
from typing_extensions import Self

from lookonce.errors import NativeError, PromptError
from lookonce.native.library import Handle, hear_standard_error, listen
from lookonce.native.text import Context, TextModel
from lookonce.sampling import Sampling

_PENALTY_WINDOW: Final = 64  # tokens, llama.cpp's default
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
# The native grammar parser recurses: what is deeper or longer could overflow its stack.
_LONGEST_GRAMMAR: Final = 64 * 1024
_DEEPEST_GRAMMAR: Final = 128
_MOST_RULES: Final = 1000
_MOST_REPETITIONS: Final = 2000  # llama-grammar.cpp's MAX_REPETITION_THRESHOLD
_REPETITION: Final = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")
_LONGEST_REASON: Final = 300  # characters of the parser's complaint, which quotes the grammar


class Sampler:
    """Draws tokens by one `Sampling`; it remembers what it drew, so each reply needs its own.

    `grammar` is what `grammar_of` gave; the repeat penalty begins with the last tokens of `prompt`. Raises PromptError
    for a grammar that the native parser refuses.
    """

    def __init__(
        self, model: TextModel, sampling: Sampling, grammar: str | None = None, prompt: Sequence[int] = ()
    ) -> None:
        self._model = model
        self._in_use = threading.Lock()
        self._closing = False
        self._grammar = None if grammar is None else self._make_grammar(grammar)
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._chain = Handle(chain, llama.llama_sampler_free, "the sampler", needs=model.native)
        for part in self._parts(sampling):
            llama.llama_sampler_chain_add(chain, part)
        for token in prompt[-_PENALTY_WINDOW:]:
            llama.llama_sampler_accept(chain, token)

    def _parts(self, sampling: Sampling) -> list[int]:
        parts = []
        if sampling.repeat_penalty != 1.0:
            parts.append(
                llama.llama_sampler_init_penalties(
                    self._model.vocabulary_size, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0
                )
            )
        if sampling.temperature == 0:
            return [*parts, llama.llama_sampler_init_greedy()]
        seed = struct.unpack("I", os.urandom(4))[0] if sampling.seed is None else sampling.seed
        return [
            *parts,
            llama.llama_sampler_init_top_k(sampling.top_k),
            llama.llama_sampler_init_top_p(sampling.top_p, 1),
            llama.llama_sampler_init_min_p(sampling.min_p, 1),
            llama.llama_sampler_init_temp(sampling.temperature),
            llama.llama_sampler_init_dist(seed),
        ]

    def _make_grammar(self, grammar: str) -> Handle:
        with hear_standard_error() as heard, listen() as log:
            handle = llama.llama_sampler_init_grammar(self._model.vocab, grammar.encode(errors="replace"), b"root")
        if not handle:
            reason = " | ".join(filter(None, [*heard, *log.tail()]))[:_LONGEST_REASON] or "the parser gave no reason"
            raise PromptError(f"the grammar cannot be used ({reason}): give GBNF with a rule named root")
        return Handle(handle, llama.llama_sampler_free, "the grammar", needs=self._model.native)

    def sample(self, context: Context, index: int = -1) -> int:
        """Draw the token that follows the one at `index` of the last batch, -1 the last one; and remember it."""
        with self._in_use:
            token = self._sample(context, index)
        if self._closing:
            self.close()
        return token

    def _sample(self, context: Context, index: int) -> int:
        chain, grammar = self._chain.pointer, self._grammar
        # The native call below aborts the process where there are none, or none that are numbers.
        context.check_logits(index)
        if grammar is None:
            return int(llama.llama_sampler_sample(chain, context.handle, index))
        # As llama.cpp's own tools do: the grammar is slow over a whole vocabulary, and what the chain would take
        # anyway is allowed more often than not.
        token = self._draw(context, index, None)
        if not _allows(grammar, token):
            token = self._draw(context, index, grammar)
        if not self._model.ends_generation(token):
            llama.llama_sampler_accept(grammar.pointer, token)
        llama.llama_sampler_accept(chain, token)
        return token

    def _draw(self, context: Context, index: int, grammar: Handle | None) -> int:
        logits = context.logits(index)
        candidates = np.zeros(len(logits), dtype=_CANDIDATE)
        candidates["id"] = np.arange(len(logits), dtype=np.int32)
        candidates["logit"] = logits
        array = _array(candidates)
        if grammar is not None:
            llama.llama_sampler_apply(grammar.pointer, ctypes.byref(array))
            if not np.isfinite(candidates["logit"]).any():
                raise PromptError("the grammar allows no token here that the model knows: widen the grammar")
        llama.llama_sampler_apply(self._chain.pointer, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise NativeError("the sampler chose no token")
        return int(array.data[array.selected].id)

    def close(self) -> None:
        """Free the samplers; may be called twice, from any thread: one that is drawing frees them afterwards."""
        self._closing = True
        if self._in_use.acquire(blocking=False):
            try:
                self._chain.close()
                if self._grammar is not None:
                    self._grammar.close()
            finally:
                self._in_use.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _allows(grammar: Handle, token: int) -> bool:
    one = np.array([(token, 1.0, 0.0)], dtype=_CANDIDATE)
    llama.llama_sampler_apply(grammar.pointer, ctypes.byref(_array(one)))
    return bool(np.isfinite(one["logit"][0]))


def _array(candidates: NDArray[np.void]) -> llama.llama_token_data_array:
    return llama.llama_token_data_array(
        data=candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data)),
        size=len(candidates),
        selected=-1,
        sorted=False,
    )


def grammar_of(sampling: Sampling) -> str | None:
    """The GBNF grammar that a reply has to follow, checked. Raises PromptError where it cannot be used."""
    grammar = sampling.grammar
    if (schema := sampling.schema_text) is not None:
        _check_schema(json.loads(schema))
        grammar = _grammar_of_schema(schema)
    if grammar is not None:
        _check_grammar(grammar)
    return grammar


# What JSON Schema knows and the converter drops without a word: a reply would not satisfy it.
_UNSUPPORTED: Final = frozenset(
    {
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
        *("not", "if", "then", "else", "dependentRequired", "dependentSchemas"),
        *("propertyNames", "patternProperties", "minProperties", "maxProperties", "unevaluatedProperties"),
    }
)
_LENGTHS: Final = ("minLength", "maxLength", "minItems", "maxItems")
_NAMED_SCHEMAS: Final = ("properties", "$defs", "definitions")  # their keys are names of the user's
_VALUES: Final = ("enum", "const", "default", "examples")


def _check_schema(schema: object) -> None:
    """Refuse what the converter leaves out, and numbers that it would write out one by one."""
    if isinstance(schema, list):
        for part in schema:
            _check_schema(part)
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        if name in _UNSUPPORTED:
            raise PromptError(f"json_schema has {name!r}, which a grammar cannot hold a reply to: leave it out")
        if name in _LENGTHS and isinstance(value, int | float) and value > _MOST_REPETITIONS:
            raise PromptError(f"json_schema has {name} {value}: give at most {_MOST_REPETITIONS}, or leave it out")
        if name == "pattern" and isinstance(value, str):
            _check_repetitions(value, "json_schema's pattern")
        if name in _NAMED_SCHEMAS and isinstance(value, dict):
            _check_schema(list(value.values()))
        elif name not in _VALUES:
            _check_schema(value)


def _grammar_of_schema(schema: str) -> str:
    try:
        return str(json_schema_to_gbnf(schema))
    except Exception as error:  # the converter raises whatever an unexpected schema runs into
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        raise PromptError(f"json_schema cannot be turned into a grammar ({reason}): simplify it") from error


def _check_grammar(grammar: str) -> None:
    if not grammar.strip():
        raise PromptError("the grammar is empty: give GBNF with a rule named root")
    if len(grammar) > _LONGEST_GRAMMAR:
        raise PromptError(f"the grammar has {len(grammar)} characters: give at most {_LONGEST_GRAMMAR}")
    if "\0" in grammar:
        raise PromptError("the grammar holds a zero character: remove it")
    if (n_rules := grammar.count("::=")) > _MOST_RULES:
        raise PromptError(f"the grammar has {n_rules} rules: give at most {_MOST_RULES}")
    _check_repetitions(grammar, "the grammar")
    depth = deepest = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST_GRAMMAR:
        raise PromptError(f"the grammar nests {deepest} brackets deep: give at most {_DEEPEST_GRAMMAR}")


def _check_repetitions(text: str, what: str) -> None:
    for repetition in _REPETITION.finditer(text):
        low, high = int(repetition[1]), int(repetition[2] or repetition[1])
        if not low <= high <= _MOST_REPETITIONS:  # a range the wrong way round fills the memory
            raise PromptError(
                f"{what} repeats {repetition[0]}: give numbers up to {_MOST_REPETITIONS}, the smaller first"
            )
