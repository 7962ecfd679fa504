"""Loading a model, and that it can be used for ever."""

import functools
import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import lookonce
from look_maker import make_look, make_picture
from lookonce.errors import ClosedError, InputError, ModelFileError, PromptError, StoreError
from lookonce.model import Model

Pair = tuple[Path, Path]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}


@pytest.fixture
def model(tiny_pair: Pair, tmp_path: Path) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], store=tmp_path / "store", threads=1, n_ctx=512) as model:
        yield model


def test_a_model_is_loaded_from_its_folder_or_its_file(tiny_pair: Pair) -> None:
    picture = make_picture(1, 100, 70)
    answers = set()
    for named in (tiny_pair[0], str(tiny_pair[0]), tiny_pair[0].parent):
        with lookonce.load(named, store=False, threads=1, n_ctx=512) as model:
            answers.add(model.ask("What?", [picture], **GREEDY).text)
            assert model.name == "Qwen3-VL tiny seed 0"
            assert (model.n_ctx, repr(model)) == (512, "<lookonce.Model 'Qwen3-VL tiny seed 0', context of 512>")
    assert len(answers) == 1


def test_the_default_context_is_8192(tiny_pair: Pair) -> None:
    with lookonce.load(tiny_pair[0], store=False, threads=1) as model:
        assert model.n_ctx == 8192


def test_both_families_answer_about_pictures(tiny_pair_25: Pair) -> None:
    with lookonce.load(tiny_pair_25[0], store=False, threads=1, n_ctx=512) as model:
        looks = [model.look(make_picture(seed, 100, 70)) for seed in range(2)]
        assert looks[0].grid == (2, 4)
        texts = {model.ask("What?", chosen, **GREEDY).text for chosen in ([], looks[:1], looks[1:], looks)}
    assert len(texts) == 4


def test_a_looks_alias_stands_for_it_in_prompts(model: Model) -> None:
    cat = model.look(make_picture(1), alias="<cat>")
    assert cat.alias == "<cat>"
    named = model.ask("What is <cat>?", [cat], **GREEDY)
    assert named.text == model.ask("What is <image_1>?", [make_picture(1)], **GREEDY).text
    with pytest.raises(PromptError, match="alias"):
        model.look(make_picture(1), alias="")


def test_every_kind_of_picture_is_taken(model: Model, tmp_path: Path) -> None:
    pixels = make_picture(1)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    look = model.look(pixels)
    for source in (path, str(path), path.read_bytes(), Image.open(path), pixels, look):
        reply = model.ask("What?", [source], **GREEDY)
        assert reply.images[0].key == look.key


def test_pixel_limits_of_a_question_are_those_of_its_pictures(model: Model) -> None:
    picture = make_picture(1, 300, 200)
    rows = model.look(picture, max_pixels=65_536).n_rows
    reply = model.ask("What?", [picture], max_pixels=65_536, **GREEDY)
    assert reply.usage.image_rows == rows < model.look(picture, min_pixels=10**5).n_rows
    assert reply.images[0].source == "store"
    assert model.chat([picture], max_pixels=65_536).ask("What?", **GREEDY).usage.image_rows == rows


def test_an_option_that_does_not_exist_is_a_type_error(model: Model) -> None:
    with pytest.raises(TypeError, match="warmth"):
        model.ask("What?", warmth=1)  # type: ignore[call-overload]


def test_what_cannot_be_loaded_is_one_of_our_errors(tiny_pair: Pair, tmp_path: Path) -> None:
    for named, mmproj in ((tmp_path / "no.gguf", None), (tiny_pair[1], None), (tiny_pair[0], tiny_pair[0])):
        with pytest.raises(ModelFileError):
            lookonce.load(named, mmproj=mmproj, store=False)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError):
        lookonce.load(tiny_pair[0], store=tmp_path / "file")


def test_what_llama_cpp_itself_refuses_is_bad_input_and_leaves_nothing_open(tiny_pair: Pair, tmp_path: Path) -> None:
    data = tiny_pair[0].read_bytes()
    assert data.count(b"qwen2") == 1  # the pre-tokenizer's name
    (tmp_path / "text.gguf").write_bytes(data.replace(b"qwen2", b"qwenX"))
    with pytest.raises(ModelFileError, match="pre-tokenizer"):
        lookonce.load(tmp_path, store=tmp_path / "store")
    gc.collect()


def test_a_model_in_a_with_block_is_closed_after_it(tiny_pair: Pair) -> None:
    with lookonce.load(tiny_pair[0], store=False, threads=1) as model:
        pass
    with pytest.raises(ClosedError):
        model.look(make_look())
    model.close()


def test_two_models_live_beside_each_other(tiny_pair: Pair, tiny_pair_25: Pair) -> None:
    def answer(model: Model) -> str:
        return model.ask("What?", [make_picture(1)], **GREEDY).text

    options: dict[str, Any] = {"store": False, "threads": 1, "n_ctx": 512}
    with lookonce.load(tiny_pair[0], **options) as one, lookonce.load(tiny_pair_25[0], **options) as other:
        first = [answer(one), answer(other), answer(one), answer(other)]
        one.close()
        assert [answer(other), first[0]] == [first[1], first[2]]
        assert first[0] != first[1]


def test_loading_and_asking_log_no_more_than_information(
    tiny_pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_pair[0].parent, tmp_path / "model")
    with (
        caplog.at_level(logging.INFO, "lookonce"),
        lookonce.load(tmp_path / "model", store=tmp_path / "store", threads=1, n_ctx=512) as model,
    ):
        model.ask("What?", [make_picture(1)], **GREEDY)
    ours = [record for record in caplog.records if record.name != "lookonce.native"]
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert ["loaded" in record.message for record in ours] == [True, True]


def grow(model: Model, rounds: int, settled: int = 50) -> int:
    """Bytes of resident memory that `rounds` looks and questions add after the first `settled`."""
    process, before = psutil.Process(), 0
    for number in range(rounds):
        if number == settled:
            gc.collect()
            before = process.memory_info().rss
        size = 32 * (1 + number % 4)
        look = model.look(make_picture(number, size, 64), min_pixels=1024)
        chat = model.chat([look], system="Be brief.")
        chat.ask("What is it?", temperature=0, max_tokens=3)
        for _ in chat.ask("And now?", stream=True, json_schema={"type": "boolean"}, max_tokens=5):
            break
    gc.collect()
    return process.memory_info().rss - before


def test_memory_does_not_grow_with_looks_and_questions(model: Model) -> None:
    assert grow(model, 120) < 20e6


def test_answers_stay_the_same_however_many_came_before(model: Model) -> None:
    looks = [model.look(make_picture(seed)) for seed in range(4)]
    first = [model.ask("What is it?", [look], **GREEDY).text for look in looks]
    order = np.random.default_rng(0).integers(0, 4, 40).tolist()
    assert [model.ask("What is it?", [looks[one]], **GREEDY).text for one in order] == [first[one] for one in order]


def test_an_option_that_there_is_not_is_refused_wherever_a_question_is_asked(tiny_pair: Pair) -> None:
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=512) as model:
        asks: list[tuple[Any, str]] = [
            (model.ask, "images, system, min_pixels, max_pixels, stream"),
            (functools.partial(model.ask, stream=True), "images, system, min_pixels, max_pixels, stream"),
            (lambda prompt, **options: model.ask_many([prompt], **options), "max_pixels, stream"),
            (model.chat().ask, "grammar, images, stream"),
        ]
        for ask, known in asks:
            with pytest.raises(
                TypeError, match=f"^there is no option 'temprature', perhaps temperature is meant: .*{known}$"
            ):
                ask("What?", temprature=0)
            with pytest.raises(TypeError, match=r"^there is no option 'image', perhaps images is meant: "):
                ask("What?", image="cat.jpg")


@pytest.mark.parametrize(
    ("options", "environment"),
    [({"store": 5}, {}), ({}, {"LOOKONCE_TRIAL": "off"}), ({"mmproj_type": "F64"}, {}), ({"n_ctx": -1}, {})],
)
def test_a_wrong_option_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], environment: dict[str, str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("lookonce.download.pull", lambda *given, **_: asked.append(given))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError):
        lookonce.load("qwen3-vl-2b-instruct", download=True, **options)
    assert asked == []
