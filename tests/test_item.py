"""What may be given to be embedded, and what is refused with its number."""

from typing import Any

import numpy as np
import pytest

from lookonce.errors import InputError
from lookonce.item import Item, check_number, read_items

PICTURE = np.zeros((8, 8, 3), dtype=np.uint8)


def test_items_of_every_kind_come_into_one_form() -> None:
    made = read_items(
        ["a", {"text": "b"}, {"image": PICTURE}, {"text": "c", "image": "x.png", "images": ["y.png", b"z"]}]
    )
    assert [one.text for one in made] == ["a", "b", "", "c"]
    assert [len(one.pictures) for one in made] == [0, 0, 1, 3]
    assert made[3].pictures == ("x.png", "y.png", b"z")
    assert [one.number for one in made] == [0, 1, 2, 3]


def test_an_item_that_is_none_of_a_key_lacks_it() -> None:
    text: Any = {"text": "a", "instruction": None}
    picture: Any = {"text": None, "image": PICTURE}
    assert [(one.text, len(one.pictures), one.instruction) for one in read_items([text, picture])] == [
        ("a", 0, None),
        ("", 1, None),
    ]


def test_the_calls_instruction_is_for_items_without_their_own() -> None:
    made = read_items(["a", {"text": "b", "instruction": "own"}], "told")
    assert [one.instruction for one in made] == ["told", "own"]


def test_any_iterable_of_items_is_read() -> None:
    assert [one.text for one in read_items(text for text in "ab")] == ["a", "b"]
    assert read_items([]) == []


BAD_ITEMS: dict[str, tuple[Any, str]] = {
    "None": (None, "it is a NoneType: give a text or a mapping"),
    "a number": (3, "it is an int"),
    "an empty text": ("", "text is empty: write something"),
    "half a character": ("a\ud800", r"text holds half a surrogate pair, '\\ud800', at 1: give whole"),
    "blanks": (" \n", "text is empty"),
    "nothing in it": ({}, "it has neither a text nor a picture"),
    "only an instruction": ({"instruction": "x"}, "it has neither a text nor a picture"),
    "only None": ({"text": None}, "it has neither a text nor a picture"),
    "no pictures": ({"images": []}, "there is no picture: give at least one"),
    "no pictures beside a text": ({"text": "a", "images": []}, "there is no picture: give at least one"),
    "None for a picture": ({"text": "a", "image": None}, "a picture is None"),
    "None for pictures": ({"text": "a", "images": None}, "images is a NoneType: give a list"),
    "an unknown key": ({"text": "a", "picture": "x.png"}, "the key 'picture': use text, image, images, instruction"),
    "a key that is no text": ({3: "a"}, "the key '3'"),
    "a text that is none": ({"text": 3}, "text is an int: give a text"),
    "an empty text beside a picture": ({"text": "", "image": "x.png"}, "text is empty"),
    "one picture for many": ({"images": "x.png"}, "images is a str: give a list of pictures"),
    "one array for many": ({"images": PICTURE}, "images is a ndarray: give a list of pictures"),
    "None among pictures": ({"images": ["x.png", None]}, "a picture is None"),
    "an instruction that is none": ({"text": "a", "instruction": 3}, "instruction is an int"),
    "an empty instruction": ({"text": "a", "instruction": " "}, "instruction is empty"),
}


@pytest.mark.parametrize("case", BAD_ITEMS)
def test_a_bad_item_is_refused_with_its_number(case: str) -> None:
    item, message = BAD_ITEMS[case]
    with pytest.raises(InputError, match=f"^item 1 cannot be embedded: .*{message}") as caught:
        read_items(["good", item])
    assert caught.value.item == 1


@pytest.mark.parametrize("items", ["a text", b"bytes", {"text": "a"}, None, 3])
def test_what_is_no_list_of_items_is_refused(items: Any) -> None:
    with pytest.raises(InputError, match="give a list of texts and mappings"):
        read_items(items)


def test_an_empty_instruction_for_the_call_is_refused_before_the_items() -> None:
    with pytest.raises(InputError, match=r"^instruction is empty"):
        read_items([], " ")


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None, 8])
def test_a_number_that_is_none_or_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"n is .*: give a whole number from 1 to 7"):
        check_number("n", value, 7)


def test_the_items_type_names_its_keys() -> None:
    assert set(Item.__annotations__) == {"text", "image", "images", "instruction"}
