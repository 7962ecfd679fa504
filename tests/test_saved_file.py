"""A saved file that is given for another, or is damaged, is named, with what it is used with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lookonce
from look_maker import make_look
from lookonce import cli
from lookonce.chat import Chat
from lookonce.embedding import ImageEmbedding
from lookonce.errors import SavedLookError
from lookonce.model import Model
from lookonce.saved_file import recognise

Pair = tuple[Path, Path]
A = make_look()


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=512) as model:
        yield model


@pytest.fixture(scope="module")
def chat(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat's file, with a look and a state in it."""
    path = tmp_path_factory.mktemp("saved") / "chat.safetensors"
    chat = model.chat([A])
    chat.ask("What?", temperature=0, max_tokens=2)
    chat.save(path)
    return path


@pytest.fixture(scope="module")
def look(chat: Path) -> Path:
    path = chat.with_name("look.safetensors")
    A.save(path)
    return path


PICTURE_WANTED = "which lookonce.Chat.load(model, path) goes on with: give a picture or a saved look here"
CHAT_WANTED = "which stands where a picture does, as in model.chat([path]): give a file that chat.save wrote here"


def refusal(use: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(SavedLookError) as caught:
        use(path)
    return str(caught.value)


def as_picture(model: Model) -> dict[str, Callable[[Path], Any]]:
    return {
        "load": ImageEmbedding.load,
        "look": model.look,
        "ask": lambda path: model.ask("What?", [path]),
        "ask_many": lambda path: model.ask_many(["What?"], [str(path)]),
        "chat": lambda path: model.chat([path], max_pixels=65_536).ask("What?"),
    }


@pytest.mark.parametrize("way", ["load", "look", "ask", "ask_many", "chat"])
def test_a_saved_chat_given_as_a_picture_is_named(
    model: Model, chat: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = refusal(as_picture(model)[way], chat)
    assert told == f"chat.safetensors is a saved chat, {PICTURE_WANTED}"
    assert caplog.text == ""


def test_a_saved_look_given_as_a_chat_is_named(model: Model, look: Path) -> None:
    told = refusal(lambda path: Chat.load(model, path), look)
    assert told == f"look.safetensors is a saved look, {CHAT_WANTED}"


@pytest.mark.parametrize("command", [["look"], ["ask", "What?", "-i"], ["embed", "-i"], ["bench", "-i"]], ids=str)
def test_the_command_line_names_it_in_one_line(
    capsys: pytest.CaptureFixture[str], tiny_pair: Pair, chat: Path, command: list[str]
) -> None:
    status = cli.main([*command, str(chat), "--model", str(tiny_pair[0])])
    told = capsys.readouterr()
    assert (status, told.out) == (2, "")
    assert told.err.startswith("lookonce: ")
    assert told.err.endswith(f"chat.safetensors is a saved chat, {PICTURE_WANTED}\n")
    assert len(told.err.splitlines()) == 1


def spoilt(path: Path, folder: Path, how: str) -> Path:
    """A copy of a saved file with a damaged header, or cut short in it."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if how == "a bracket":
        data[8 + data[8 : 8 + length].rindex(b"}")] = 0x20
    elif how == "the length":
        data[:8] = (1 << 40).to_bytes(8, "little")
    elif how == "cut short":
        del data[8 + length // 2 :]
    elif how == "the beginning":
        data[8:80] = bytes(72)
    target = folder / path.name
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("how", ["a bracket", "the length", "cut short"])
@pytest.mark.parametrize("what", ["chat", "look"])
@pytest.mark.usefixtures("look")
def test_a_damaged_header_is_told_as_that_of_what_it_was(
    model: Model, chat: Path, tmp_path: Path, what: str, how: str
) -> None:
    path = spoilt(chat.with_name(f"{what}.safetensors"), tmp_path, how)
    reason = "its header is damaged" if how == "a bracket" else "is cut short"
    damaged = f"{what}.safetensors is a saved {what}, but {reason}: save it again, or use another copy"
    assert refusal(lambda path: Chat.load(model, path), path) == (
        damaged if what == "chat" else f"look.safetensors is a saved look, {CHAT_WANTED}"
    )
    assert refusal(model.look, path) == (
        damaged if what == "look" else f"chat.safetensors is a saved chat, {PICTURE_WANTED}"
    )


def test_where_not_even_that_can_be_told_it_is_said_what_was_expected(
    model: Model, chat: Path, look: Path, tmp_path: Path
) -> None:
    told = refusal(lambda path: Chat.load(model, path), spoilt(chat, tmp_path, "the beginning"))
    expected = "or its header is damaged: give a file that chat.save wrote"
    assert told == f"chat.safetensors is not a saved chat, {expected}"
    told = refusal(model.look, spoilt(look, tmp_path, "the beginning"))
    assert told == "look.safetensors is not a saved look, or its header is damaged: give a picture or a saved look"


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": {"format": "pt"}}], ids=["bare", "as of an adapter"])
def test_a_file_of_weights_is_refused_as_a_chat_without_reading_it(
    model: Model, tmp_path: Path, metadata: dict[str, Any]
) -> None:
    path = tmp_path / "model.safetensors"
    weights = {"w": {"dtype": "F32", "shape": [1 << 20, 1 << 17], "data_offsets": [0, 1 << 39]}}
    header = json.dumps(metadata | weights)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + (1 << 39))
    assert refusal(lambda path: Chat.load(model, path), path) == (
        "model.safetensors is not a saved chat: give a file that chat.save wrote"
        if metadata
        else "model.safetensors is not a saved chat, or its header is damaged: give a file that chat.save wrote"
    )


def test_only_what_begins_as_this_library_writes_it_is_recognised(chat: Path, look: Path) -> None:
    assert recognise(chat.read_bytes()) == "saved chat"
    assert recognise(look.read_bytes()) == "saved look"
    for data in (b"", b"\x89PNG\r\n\x1a\n", bytes(96) + chat.read_bytes()):
        assert recognise(data) is None
