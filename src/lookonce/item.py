"""What is given to be embedded, checked and in one form. Knows nothing of models."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from typing_extensions import TypedDict

from lookonce.embedding import ImageEmbedding
from lookonce.errors import InputError, LookonceError
from lookonce.images import PictureSource

Picture = PictureSource | ImageEmbedding
AnyError = TypeVar("AnyError", bound=LookonceError)


class Item(TypedDict, total=False):
    """One thing to embed: a text, one picture or several, or both; `instruction` replaces the embedder's."""

    text: str
    image: Picture
    images: list[Picture] | tuple[Picture, ...]
    instruction: str


@dataclass(frozen=True, slots=True, eq=False)
class WantedItem:
    """An item in one form: its text, its pictures before it, its instruction, and its number among others."""

    text: str
    pictures: tuple[Picture, ...]
    instruction: str | None
    number: int | None = None


def read_items(items: Iterable[str | Item], instruction: str | None = None) -> list[WantedItem]:
    """Items in one form; `instruction` is theirs where they have none of their own.

    Raises InputError, with the item's number from 0, for one that is no item.
    """
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise InputError(f"items are {kind_of(items)}: give a list of texts and mappings")
    told = checked_instruction(instruction)
    wanted = []
    for number, item in enumerate(items):
        try:
            wanted.append(_read_item(item, told, number))
        except InputError as error:
            raise number_error(error, number) from error
    return wanted


def _read_item(item: str | Item, instruction: str | None, number: int) -> WantedItem:
    if isinstance(item, str):
        return WantedItem(checked_text("text", item), (), instruction, number)
    if not isinstance(item, Mapping):
        raise InputError(f"it is {kind_of(item)}: give a text or a mapping with text, image or images")
    if unknown := set(item) - set(Item.__annotations__):
        raise InputError(f"it has the key {min(map(str, unknown))!r}: use text, image, images, instruction")
    text = item.get("text")
    given = [item["image"]] if "image" in item else []
    pictures = (*map(checked_picture, given), *(checked_pictures(_listed(item["images"])) if "images" in item else ()))
    if text is None and not pictures:
        raise InputError("it has neither a text nor a picture: give one of them")
    own = checked_instruction(item.get("instruction"))
    return WantedItem("" if text is None else checked_text("text", text), pictures, own or instruction, number)


def _listed(images: object) -> Sequence[Picture]:
    if not isinstance(images, list | tuple):
        raise InputError(f"images is {kind_of(images)}: give a list of pictures, or use the key image")
    return images


def number_error(error: AnyError, number: int) -> AnyError:
    """The same error, naming the item; to be raised from the error itself."""
    named = type(error)(f"item {number} cannot be embedded: {error}")
    named.item = number
    return named


def checked_text(name: str, text: object) -> str:
    """Give a text back. Raises InputError for another type, for one with nothing in it, and for half characters."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {kind_of(text)}: give a text")
    if not text.strip():
        raise InputError(f"{name} is empty: write something")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half a surrogate pair, {text[error.start]!r}, at {error.start}: give whole characters"
        ) from error
    return text


def checked_instruction(instruction: object) -> str | None:
    """Give an instruction back, or None for none. Raises as `checked_text`."""
    return None if instruction is None else checked_text("instruction", instruction)


def checked_picture(picture: Picture) -> Picture:
    """Give a picture back; whether it can be opened is seen later. Raises InputError for None."""
    if picture is None:
        raise InputError("a picture is None: give a path, bytes, an image, an array or a look")
    return picture


def checked_pictures(pictures: Iterable[Picture]) -> tuple[Picture, ...]:
    """Give pictures back. Raises as `checked_picture`, and where there is none."""
    checked = tuple(map(checked_picture, pictures))
    if not checked:
        raise InputError("there is no picture: give at least one, or embed the text alone")
    return checked


def check_number(name: str, value: object, most: int | None = None) -> int:
    """Give a whole number from 1 to `most` back. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise InputError(f"{name} is {value!r}: give a whole number {f'from 1 to {most}' if most else 'of at least 1'}")
    return value


def kind_of(value: object) -> str:
    """The name of a value's type with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
