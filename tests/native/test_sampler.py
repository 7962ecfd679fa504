"""The next token is drawn as the options say; the truth is numpy's, over the same logits."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lookonce.errors import ClosedError, NativeError, PromptError
from lookonce.native.sampler import Sampler, grammar_of
from lookonce.native.text import Context, ContextOptions, TextModel
from lookonce.sampling import Sampling

Pair = tuple[Path, Path]
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[TextModel]:
    with TextModel(tiny_pair[0]) as model:
        yield model


@pytest.fixture(scope="module")
def context(model: TextModel) -> Iterator[Context]:
    """A context that holds a prompt, its logits at hand."""
    with Context(model, ContextOptions(n_ctx=256, threads=1)) as context:
        context.decode_tokens(PROMPT, position=0)
        yield context


def draw(model: TextModel, context: Context, accepted: tuple[int, ...] = (), **options: Any) -> int:
    sampling = Sampling(**options)
    with Sampler(model, sampling, grammar_of(sampling), accepted) as sampler:
        return sampler.sample(context)


def grammar_sampler(model: TextModel, sampling: Sampling) -> Sampler:
    return Sampler(model, sampling, grammar_of(sampling))


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(powers / powers.sum())


def write(model: TextModel, sampling: Sampling, count: int) -> bytes:
    """What a model writes under a sampling, through to its end or `count` tokens."""
    written = b""
    options = ContextOptions(n_ctx=512, threads=1)
    with Context(model, options) as own, Sampler(model, sampling, grammar_of(sampling)) as sampler:
        own.decode_tokens(PROMPT, position=0)
        for position in range(len(PROMPT), len(PROMPT) + count):
            token = sampler.sample(own)
            if model.ends_generation(token):
                break
            written += model.piece(token)
            own.decode_tokens([token], position=position)
    return written


def test_temperature_zero_takes_the_likeliest_token(model: TextModel, context: Context) -> None:
    assert draw(model, context, temperature=0) == int(context.logits().argmax())
    assert draw(model, context, temperature=0, top_k=5, seed=3) == int(context.logits().argmax())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_an_option_that_leaves_one_token_takes_the_likeliest(
    model: TextModel, context: Context, options: dict[str, Any]
) -> None:
    best = int(context.logits().argmax())
    wide = {"temperature": 5.0, "top_k": 0, "top_p": 1.0}
    assert {draw(model, context, **{**wide, **options, "seed": seed}) for seed in range(20)} == {best}


def test_a_draw_follows_the_softmax_of_the_logits_over_the_temperature(model: TextModel, context: Context) -> None:
    with Sampler(model, Sampling(temperature=0.8, top_k=0, top_p=1.0, seed=1)) as sampler:
        counts = Counter(sampler.sample(context) for _ in range(4000))
    expected = probabilities(context.logits() / 0.8) * 4000
    likely = np.flatnonzero(expected > 20)
    assert len(likely) > 3
    for token in likely:
        assert abs(counts[int(token)] - expected[token]) < 5 * np.sqrt(expected[token])


def test_top_k_leaves_the_k_likeliest(model: TextModel, context: Context) -> None:
    best = set(np.argsort(context.logits())[-3:].tolist())
    with Sampler(model, Sampling(temperature=20.0, top_k=3, top_p=1.0, seed=1)) as sampler:
        assert {sampler.sample(context) for _ in range(200)} == best


def test_min_p_leaves_those_within_a_share_of_the_likeliest(model: TextModel, context: Context) -> None:
    chances = probabilities(context.logits())
    allowed = set(np.flatnonzero(chances >= 0.3 * chances.max()).tolist())
    with Sampler(model, Sampling(temperature=20.0, top_k=0, top_p=1.0, min_p=0.3, seed=1)) as sampler:
        assert {sampler.sample(context) for _ in range(300)} == allowed


def test_a_seed_repeats_a_draw_and_another_does_not(model: TextModel, context: Context) -> None:
    def draws(seed: int | None) -> list[int]:
        with Sampler(model, Sampling(temperature=5.0, top_k=0, top_p=1.0, seed=seed)) as sampler:
            return [sampler.sample(context) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_the_repeat_penalty_divides_the_logits_of_what_was_seen(model: TextModel, context: Context) -> None:
    logits = context.logits()
    order = np.argsort(logits)[::-1]
    best = int(order[0])
    assert logits[best] > 0
    weakened = logits.copy()
    weakened[best] /= 100.0
    expected = int(weakened.argmax())
    assert expected != best
    assert draw(model, context, (best,), temperature=0, repeat_penalty=100.0) == expected
    assert draw(model, context, (best,), temperature=0, repeat_penalty=1.0) == best
    old = (best, *[int(order[-1])] * 64)
    assert draw(model, context, old, temperature=0, repeat_penalty=100.0) == best


# --- grammars


def test_a_grammar_is_followed_to_its_end(model: TextModel) -> None:
    for seed in range(5):
        sampling = Sampling(grammar='root ::= ("yes" | "no") " " [0-9]{3}', temperature=3.0, top_k=0, seed=seed)
        words = write(model, sampling, 30).decode().split()
        assert words[0] in ("yes", "no")
        assert len(words[1]) == 3
        assert words[1].isdigit()


def test_what_the_chain_would_take_anyway_is_taken_under_a_grammar_too(model: TextModel) -> None:
    free = write(model, Sampling(temperature=0), 8)
    assert write(model, Sampling(temperature=0, grammar="root ::= .*"), 8) == free


def test_the_likeliest_allowed_token_is_taken_where_the_likeliest_is_not_allowed(
    model: TextModel, context: Context
) -> None:
    allowed = [token for token in range(512) if model.piece(token)[:1].isdigit() and len(model.piece(token)) == 1]
    logits = context.logits()
    best = max(allowed, key=lambda token: logits[token])
    assert draw(model, context, temperature=0, grammar="root ::= [0-9]") == best


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["colour", "count", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_satisfied(model: TextModel, seed: int) -> None:
    found = json.loads(write(model, Sampling(json_schema=SCHEMA, seed=seed, temperature=1.0, top_k=0), 300))
    assert set(found) == {"colour", "count", "tags"}
    assert found["colour"] in ("red", "blue")
    assert isinstance(found["count"], int)
    assert 1 <= len(found["tags"]) <= 2
    assert all(isinstance(tag, bool) for tag in found["tags"])


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "   ",
        "root ::= (",
        'foo ::= "a"',
        "root ::= root",
        "root ::= nothing",
        'root ::= "a" "\0"',
        "root ::= " + "(" * 200 + '"a"' + ")" * 200,
        'root ::= "' + "a" * 300_000 + '"',
        "\ud800",
        "root ::= [a-",
        'root ::= "a"{99999999999999999999}',
    ],
    ids=range(12),
)
def test_a_grammar_that_cannot_be_used_is_one_error_of_one_line(
    model: TextModel, grammar: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PromptError, match="grammar") as caught:
        grammar_sampler(model, Sampling(grammar=grammar))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_syntax_error_in_a_grammar_is_told_in_the_parsers_words(model: TextModel) -> None:
    with pytest.raises(PromptError, match=r"expecting '\)'"):
        grammar_sampler(model, Sampling(grammar='root ::= ("a"'))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#/nowhere"},
        {"type": "nothing"},
        "5",
        "[]",
        {"type": "string", "pattern": "("},
        {"allOf": 5},
    ],
    ids=range(7),
)
def test_a_schema_that_cannot_be_a_grammar_is_refused(model: TextModel, schema: Any) -> None:
    with pytest.raises(PromptError):
        grammar_sampler(model, Sampling(json_schema=schema))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"grammar": 'root ::= "a"{5,2}'}, "repeats {5,2}"),
        ({"grammar": 'root ::= "a"{1,9000}'}, "repeats {1,9000}"),
        ({"grammar": "root ::= r0\n" + "\n".join(f"r{n} ::= r{n + 1}" for n in range(2000))}, "2001 rules"),
        ({"json_schema": {"type": "string", "maxLength": 10**9}}, "maxLength 1000000000"),
        ({"json_schema": {"items": {"pattern": "^a{2,99999}$"}}}, "repeats {2,99999}"),
    ],
    ids=["reversed", "large", "many rules", "long string", "pattern"],
)
def test_a_grammar_that_would_fill_the_memory_or_the_stack_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PromptError, match=re.escape(reason)):
        grammar_of(Sampling(**options))


# --- what would abort the process


def test_sampling_before_anything_was_evaluated_is_a_native_error(model: TextModel) -> None:
    with (
        Context(model, ContextOptions(n_ctx=256, threads=1)) as empty,
        Sampler(model, Sampling(temperature=0)) as sampler,
        pytest.raises(NativeError, match="no logits"),
    ):
        sampler.sample(empty)


def test_a_closed_sampler_says_so_and_closes_twice(model: TextModel, context: Context) -> None:
    sampler = grammar_sampler(model, Sampling(grammar='root ::= "a"'))
    sampler.close()
    sampler.close()
    with pytest.raises(ClosedError, match="sampler"):
        sampler.sample(context)
