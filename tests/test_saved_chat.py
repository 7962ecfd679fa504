"""A conversation saved and loaded goes on as one that was never interrupted; so do two of which one was forked."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lookonce
from look_maker import make_look, make_picture
from lookonce import saved_chat
from lookonce.chat import Chat
from lookonce.errors import ClosedError, InputError, MismatchError, SavedLookError
from lookonce.model import Model
from lookonce.saved_chat import SavedChat
from lookonce.tensor_file import array_bytes, head, unpack

Logits = NDArray[np.float32]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}
A, B, C = (make_look(seed, (4, 5)) for seed in range(3))


@pytest.fixture(scope="module")
def folder(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for path in tiny_pair:
        os.utime(shutil.copy(path, folder), (1e9, 1e9))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder) as model:
        yield model


def load(folder: Path, **options: Any) -> Model:
    return lookonce.load(folder, store=False, **{"threads": 1, "n_ctx": 2048, **options})


def next_logits(model: Model, chat: Chat, question: str = "And then?") -> tuple[Logits, lookonce.Reply]:
    reply = chat.ask(question, temperature=0, max_tokens=1)
    return model.engine._open_context().logits(), reply


def talk(chat: Chat, turns: int) -> None:
    for turn in range(turns):
        chat.ask(f"Number {turn}?", [C] if turn == 2 else [], temperature=0, max_tokens=3)


def said(chat: Chat) -> list[tuple[str, tuple[object, ...]]]:
    return [
        (one.role, tuple(part if isinstance(part, str) else part.key for part in one.parts)) for one in chat.messages
    ]


@pytest.mark.parametrize("setting", [EXACT, {}, {"kv_type": "q8_0"}], ids=["exact", "default", "q8_0"])
@pytest.mark.parametrize("turns", [1, 20])
def test_a_loaded_chat_goes_on_with_the_logits_of_one_never_interrupted(
    folder: Path, tmp_path: Path, setting: dict[str, Any], turns: int
) -> None:
    with load(folder, **setting) as model:
        chat = model.chat([A, B], system="Be brief.")
        talk(chat, turns)
        chat.save(tmp_path / "chat.safetensors")
        expected, reply = next_logits(model, chat)
    with load(folder, **setting) as model:
        loaded = Chat.load(model, tmp_path / "chat.safetensors")
        assert said(loaded) == said(chat)[:-2]
        assert list(loaded.images) == list(chat.images)
        found, answer = next_logits(model, loaded)
        assert np.array_equal(found, expected)
        assert (answer.text, answer.usage.reused) == (reply.text, reply.usage.reused)
        assert answer.usage.prefix == "file"
        assert said(loaded) == said(chat)


def test_a_chat_loaded_and_saved_again_is_the_same_file(model: Model, tmp_path: Path) -> None:
    chat = model.chat([A.with_alias("<cat>")])
    chat.ask("What is <cat>?", **GREEDY)
    chat.save(tmp_path / "one.safetensors")
    again = Chat.load(model, tmp_path / "one.safetensors")
    again.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert again.ask("And <cat>?", **GREEDY).text == chat.ask("And <cat>?", **GREEDY).text


def test_pictures_that_wait_for_their_question_are_saved_too(model: Model, folder: Path, tmp_path: Path) -> None:
    picture = make_picture(1, 300, 200)
    chat = model.chat([picture, A], max_pixels=65_536)
    chat.save(tmp_path / "chat.safetensors")
    shutil.copy(next(folder.glob("Qwen*.gguf")), tmp_path)  # without its projector
    with load(tmp_path) as lone:
        loaded = Chat.load(lone, tmp_path / "chat.safetensors")
        reply = loaded.ask("What?", **GREEDY)
    expected = model.ask("What?", [picture, A], max_pixels=65_536, **GREEDY)
    assert (reply.text, reply.usage.image_rows) == (expected.text, expected.usage.image_rows)
    assert loaded._look.max_pixels == 65_536


def test_an_empty_chat_and_one_that_was_never_evaluated_can_be_saved(model: Model, tmp_path: Path) -> None:
    for number, chat in enumerate([model.chat(), model.chat(system="Be brief.")]):
        path = tmp_path / f"{number}.safetensors"
        chat.save(path)
        assert said(Chat.load(model, path)) == said(chat)
        assert Chat.load(model, path).ask("What?", **GREEDY).text == chat.ask("What?", **GREEDY).text


def test_a_stream_under_way_is_closed_and_saved_as_far_as_it_came(model: Model, tmp_path: Path) -> None:
    chat = model.chat([A])
    stream = chat.ask("What?", stream=True, temperature=0, max_tokens=50)
    given = next(stream)
    chat.save(tmp_path / "chat.safetensors")
    assert list(stream) == []
    assert said(Chat.load(model, tmp_path / "chat.safetensors"))[-1] == ("assistant", (given,))


@pytest.mark.parametrize("options", [{"kv_type": "f32"}, {"n_ctx": 256}, {"threads": 2}, {"state": "off"}], ids=str)
def test_a_state_of_another_context_is_evaluated_again_with_the_same_text(
    model: Model, folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    chat = model.chat([A])
    chat.ask("What?", **GREEDY)
    chat.save(tmp_path / "chat.safetensors")
    with load(folder, **options) as other:
        loaded = Chat.load(other, tmp_path / "chat.safetensors")
        reply = loaded.ask("And?", **GREEDY)
        assert reply.usage.prefix == "evaluated"
        assert reply.text == chat.fork().ask("And?", **GREEDY).text


def test_another_text_model_refuses_a_saved_chat_with_both_names(
    model: Model, tiny_pair_25: tuple[Path, Path], tmp_path: Path
) -> None:
    chat = model.chat()
    chat.ask("What?", **GREEDY)
    chat.save(tmp_path / "chat.safetensors")
    with (
        lookonce.load(tiny_pair_25[0], store=False, threads=1, n_ctx=256) as other,
        pytest.raises(MismatchError, match=r"saved with the text model 'Qwen3-VL tiny.*but this is 'Qwen2.5-VL tiny"),
    ):
        Chat.load(other, tmp_path / "chat.safetensors")


def test_a_closed_model_saves_and_loads_nothing(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    chat = model.chat()
    chat.ask("What?", **GREEDY)
    chat.save(tmp_path / "chat.safetensors")
    model.close()
    with pytest.raises(ClosedError):
        chat.save(tmp_path / "other.safetensors")
    with pytest.raises(ClosedError):
        Chat.load(model, tmp_path / "chat.safetensors")


# --- files


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "chat.safetensors"
    chat = model.chat([A])
    chat.ask("What?", **GREEDY)
    chat.save(path)
    return path.read_bytes()


def test_any_changed_byte_and_any_cut_is_a_damaged_file(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "chat.safetensors"
    chance = np.random.default_rng(0)
    places = [*range(0, 600, 7), *chance.integers(600, len(saved), 60).tolist(), len(saved) - 1]
    for place in places:
        data = bytearray(saved)
        data[place] ^= 1 << int(chance.integers(8))
        path.write_bytes(data)
        with pytest.raises(SavedLookError, match=r"chat\.safetensors"):
            SavedChat.load(path)
    for length in [0, 1, 8, 100, len(saved) // 2, len(saved) - 1]:
        path.write_bytes(saved[:length])
        with pytest.raises(SavedLookError, match=r"chat\.safetensors"):
            SavedChat.load(path)
    path.write_bytes(saved)
    SavedChat.load(path)


def rewritten(saved: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The file with other contents and the right checksum, as a stranger could write it."""
    metadata, tensors = unpack(saved, None, name="chat")
    tensors = dict(tensors)
    facts = json.loads(tensors["chat"].tobytes())
    change(facts, tensors)
    tensors["chat"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8).reshape(1, -1)
    metadata["blake3"] = saved_chat._checksum(tensors)
    return b"".join([head(metadata, tensors), *map(array_bytes, tensors.values())])


REFUSED: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "no messages": lambda facts, _: facts.pop("messages"),
    "a message of nobody": lambda facts, _: facts["messages"][0].update(role="tool"),
    "a message of a number": lambda facts, _: facts["messages"][0].update(parts=[5]),
    "a look that is not there": lambda facts, _: facts["known"].update({"<a>": 7}),
    "a negative look": lambda facts, _: facts["waiting"].append(-1),
    "rows that a look has not": lambda facts, _: facts["held"]["units"].__setitem__(5, [0, 0, 99, 5, True]),
    "ends that are none": lambda facts, _: facts["held"]["ends"].append([999, True]),
    "an end inside": lambda facts, _: facts["held"]["ends"].pop(),
    "options that are none": lambda facts, _: facts["look_options"].update(dtype="f8"),
    "no state": lambda _, tensors: tensors.pop("state"),
    "no look": lambda _, tensors: tensors.pop("look.0"),
    "a damaged look": lambda _, tensors: tensors.update({"look.0": tensors["look.0"][:, :-1]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contents_that_contradict_one_another_are_refused(saved: bytes, tmp_path: Path, case: str) -> None:
    path = tmp_path / "chat.safetensors"
    path.write_bytes(rewritten(saved, REFUSED[case]))
    with pytest.raises(SavedLookError):
        SavedChat.load(path)


def with_words(change: Callable[[NDArray[np.int32]], None]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def changed(_: dict[str, Any], tensors: dict[str, Any]) -> None:
        state = tensors["state"].copy()
        change(state[0, : state.shape[1] // 4 * 4].view(np.int32))
        tensors["state"] = state

    return changed


MISFITS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "cells at other positions": with_words(lambda words: words.__setitem__(4, 77)),
    "a cell of two sequences": with_words(lambda words: words.__setitem__(5, 2)),
    "more cells": with_words(lambda words: words.__setitem__(3, 10**6)),
    "another magic": with_words(lambda words: words.__setitem__(0, 1)),
    "no bytes": lambda _, tensors: tensors.update(state=np.zeros((1, 1), dtype=np.uint8)),
    "cut short": lambda _, tensors: tensors.update(state=tensors["state"][:, :-7]),
    "a column": lambda _, tensors: tensors.update(state=tensors["state"].reshape(-1, 1)),
    "other tokens": lambda facts, _: facts["held"]["units"].__setitem__(0, 3),
    "another last position": lambda facts, _: facts["held"].update(last=0),
    "another context": lambda facts, _: facts["facts"].update(kv_type="f32"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_state_that_a_stranger_made_up_is_not_believed(folder: Path, saved: bytes, tmp_path: Path, case: str) -> None:
    path = tmp_path / "chat.safetensors"
    replies = []
    for data in (saved, rewritten(saved, MISFITS[case])):
        path.write_bytes(data)
        with load(folder) as model:
            replies.append(Chat.load(model, path).ask("And?", **GREEDY))
    assert [reply.usage.prefix for reply in replies] == ["file", "evaluated"]
    assert replies[0].text == replies[1].text


@pytest.mark.parametrize("name", ["chat.json", "chat", "chat.pt"])
def test_other_file_names_are_refused(model: Model, tmp_path: Path, name: str) -> None:
    with pytest.raises(SavedLookError, match=r"not a saved chat's name: end it in \.safetensors"):
        model.chat().save(tmp_path / name)
    with pytest.raises(
        SavedLookError, match=r"not a saved chat's name: give a \.safetensors file that chat\.save wrote"
    ):
        Chat.load(model, tmp_path / name)


@pytest.mark.parametrize("given", [A, None, b"chat.safetensors"], ids=["a look", "nothing", "bytes"])
def test_what_is_no_path_is_refused(model: Model, given: Any) -> None:
    for use in (model.chat().save, lambda path: Chat.load(model, path)):
        with pytest.raises(SavedLookError, match=f"not in an? {type(given).__name__}: give its path"):
            use(given)


def test_what_is_no_saved_chat_is_refused(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(SavedLookError, match="does not exist"):
        Chat.load(model, path)
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(SavedLookError, match="is a device or a pipe: expected a saved chat"):
        Chat.load(model, pipe)
    with pytest.raises(SavedLookError, match="cannot be written"):
        model.chat().save(tmp_path / "none" / "a.safetensors")


def test_a_file_of_a_later_format_says_update(saved: bytes, tmp_path: Path) -> None:
    metadata, tensors = unpack(saved, None, name="chat")
    metadata["format_version"] = "2"
    path = tmp_path / "chat.safetensors"
    path.write_bytes(b"".join([head(metadata, tensors), *map(array_bytes, tensors.values())]))
    with pytest.raises(SavedLookError, match="has format version 2, and this lookonce reads 1: update lookonce"):
        SavedChat.load(path)


def test_a_saved_chat_holds_no_other_conversation(folder: Path, tmp_path: Path) -> None:
    """Two chats begin with the same tokens, and only the second's state is still in memory."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
    with load(folder, n_ctx=512) as model:
        first, second = model.chat(images=[make_look(0)]), model.chat(images=[make_look(5)])
        first.ask("Hello, I am A.", **options)
        second.ask("I am B, my secret is 4711. " * 9, **options)
        model.chat().ask("Another talk goes here. " * 14, **options)
        kept = model.engine._kept
        assert kept is not None
        for one in list(kept._states):
            if one.held.units[: len(first._held)] == list(first._held):
                kept.drop(one)
        first.save(tmp_path / "first.safetensors")
        second.save(tmp_path / "second.safetensors")
        states = [SavedChat.load(tmp_path / f"{name}.safetensors").state for name in ("first", "second")]
        for chat, state in zip((first, second), states, strict=True):
            assert state is not None
            assert state.held.units == list(chat._held[: len(state.held.units)])
        lengths = [len(state.held.units) for state in states if state is not None]
        assert lengths[0] < 10
        assert lengths[1] > 100
        expected = [chat.ask("And?", **options).text for chat in (first, second)]
    with load(folder, n_ctx=512) as model:
        chats = [Chat.load(model, tmp_path / f"{name}.safetensors") for name in ("first", "second")]
        assert [chat.ask("And?", **options).text for chat in chats] == expected


def test_a_model_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model is a str: give what"):
        Chat.load("demo", tmp_path / "chat.safetensors")  # type: ignore[arg-type]


# --- forks


def test_forks_share_their_beginning_and_do_not_touch_each_other(folder: Path) -> None:
    questions = ["Why?", "Which colour?", "How many?"]

    def fresh(question: str) -> tuple[Logits, Logits]:
        with load(folder) as model:
            chat = model.chat([A, B])
            talk(chat, 3)
            first = next_logits(model, chat, question)[0]
            return first, next_logits(model, chat, "And?")[0]

    expected = [fresh(question) for question in questions]
    with load(folder) as model:
        chat = model.chat([A, B])
        talk(chat, 3)
        before = said(chat)
        forks = [chat, chat.fork(), chat.fork()]
        for fork, question, logits in zip(forks, questions, expected, strict=True):
            found, reply = next_logits(model, fork, question)
            assert np.array_equal(found, logits[0])
            assert (reply.usage.reused > 80, reply.usage.prefix) == (True, "memory")
        for fork, question, logits in zip(forks, questions, expected, strict=True):
            assert np.array_equal(next_logits(model, fork, "And?")[0], logits[1])
            assert said(fork)[:-4] == before
            assert said(fork)[-4][1] == (question,)
        assert len({id(one._messages) for one in forks}) == 3


def test_a_fork_keeps_pictures_aliases_and_limits(model: Model) -> None:
    chat = model.chat([A.with_alias("<cat>")], system="Be brief.", max_pixels=65_536)
    fork = chat.fork()
    assert fork.ask("What is <cat>?", **GREEDY).text == chat.ask("What is <cat>?", **GREEDY).text
    assert list(fork.images) == ["<cat>"]
    other = chat.fork()
    other.ask("And <image_2>?", [B], **GREEDY)
    assert list(chat.images) == ["<cat>"]
    assert other._look == chat._look
