"""The options of a reply are checked before anything native sees them."""

import json
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import pytest

from lookonce.errors import PromptError
from lookonce.sampling import Sampling, SamplingOptions, refuse_unknown

NAN, INFINITE = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.5, True, "5", 2**31],
    "temperature": [-0.1, 101, NAN, INFINITE, "1", None, True],
    "top_p": [-0.1, 1.1, NAN, "1", None],
    "top_k": [-1, 1.5, True, None, 2**31],
    "min_p": [-0.1, 1.1, NAN],
    "repeat_penalty": [0, -1, NAN, INFINITE],
    "seed": [-1, 2**32 - 1, 1.5, True],
    "stop": ["", [""], ["a", ""], [1], 5, None, {"a"}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=rf"^{name} is "):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", None), ("max_tokens", 1), ("temperature", 0), ("top_p", 0), ("top_p", 1), ("top_k", 0)],
        *[("seed", 0), ("seed", 2**32 - 2), ("seed", None), ("repeat_penalty", 1), ("stop", ()), ("stop", ["a"])],
    ],
)
def test_the_ends_of_the_ranges_are_inside(name: str, value: Any) -> None:
    assert getattr(Sampling(**{name: value}), name) == value


def test_one_stop_text_is_a_tuple_of_one() -> None:
    assert Sampling(stop="end").stop_texts == ("end",)
    assert Sampling(stop=["a", "b"]).stop_texts == ("a", "b")


def test_schema_and_grammar_together_are_refused() -> None:
    with pytest.raises(PromptError, match="json_schema and grammar"):
        Sampling(json_schema={}, grammar='root ::= "a"')


@pytest.mark.parametrize("schema", [{"type": "object"}, '{"type": "object"}'])
def test_a_schema_is_a_mapping_or_its_text(schema: Any) -> None:
    text = Sampling(json_schema=schema).schema_text
    assert text is not None
    assert json.loads(text) == {"type": "object"}
    assert Sampling().schema_text is None


@pytest.mark.parametrize("schema", ["{", {"a": object()}, MappingProxyType({}), "[" * 100_000])
def test_a_schema_that_is_no_json_is_refused(schema: Any) -> None:
    with pytest.raises(PromptError, match="json_schema is not JSON"):
        _ = Sampling(json_schema=schema).schema_text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("top_pp", "top_p"),
        ("max_token", "max_tokens"),
        ("image", "images"),
        *((other, None) for other in ("system", "max_pixels", "min_pixels", "alias", "temp", "n")),
    ],
)
def test_an_option_that_there_is_not_is_refused_with_the_nearest_and_the_list(name: str, meant: str | None) -> None:
    with pytest.raises(TypeError) as caught:
        refuse_unknown({"top_k": 1, name: 0}, "images", "stream")
    perhaps = f", perhaps {meant} is meant" if meant else ""
    known = ", ".join([*SamplingOptions.__annotations__, "images", "stream"])
    assert str(caught.value) == f"there is no option {name!r}{perhaps}: choose from {known}"


def test_every_option_that_there_is_goes_through_and_is_one_of_sampling() -> None:
    refuse_unknown(dict.fromkeys(SamplingOptions.__annotations__))
    assert list(SamplingOptions.__annotations__) == [one.name for one in fields(Sampling)]
