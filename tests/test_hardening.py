"""What would end the process, lose an interrupt or serve something wrong, each seen once and kept away since."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lookonce
from lookonce import engine, looker
from lookonce.errors import LookonceError, ModelFileError, NativeError
from lookonce.model import Model

Pair = tuple[Path, Path]


@pytest.fixture
def model(tiny_pair: Pair, tmp_path: Path) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], mmproj=tiny_pair[1], store=tmp_path / "store", threads=1) as loaded:
        yield loaded


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("grammar", [None, "root ::= [a-z ]+"], ids=["free", "grammar"])
def test_a_stream_can_be_closed_from_another_thread_at_any_moment(model: Model, grammar: str | None) -> None:
    for turn in range(30):
        stream = model.ask("Go on.", stream=True, grammar=grammar, max_tokens=60)
        closer = threading.Timer(0.002 * (turn % 10), stream.close)
        closer.start()
        for _ in stream:
            pass
        closer.join()
    assert model.ask("And now?", max_tokens=3, temperature=0).usage.generated > 0


def test_a_daemon_thread_at_work_does_not_crash_the_end_of_the_process(tiny_pair: Pair) -> None:
    code = f"""
import threading, time, lookonce
model = lookonce.load({str(tiny_pair[0])!r}, store=False, threads=1)
def work():
    while True:
        model.ask("Go on.", max_tokens=50)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    for _ in range(5):
        assert subprocess.run([sys.executable, "-c", code], check=False, timeout=90).returncode == 0


def test_ctrl_c_during_a_look_is_raised(tiny_pair: Pair) -> None:
    code = f"""
import os, signal, threading, numpy, lookonce
model = lookonce.load({str(tiny_pair[0])!r}, mmproj={str(tiny_pair[1])!r}, store=False, threads=1)
model.look(numpy.zeros((64, 64, 3), numpy.uint8))
caught = 0
for seed in range(8):
    pixels = numpy.random.default_rng(seed).integers(0, 255, (640, 640, 3), dtype=numpy.uint8)
    timer = threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while True:
            model.look(pixels)
    except KeyboardInterrupt:
        caught += 1
print(caught)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("8", "")


def test_python_has_its_own_interrupt_handler_back_after_native_work(model: Model) -> None:
    model.ask("What?", [picture(1)], max_tokens=2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_projector_replaced_after_loading_never_reaches_native_code(tiny_pair: Pair, tmp_path: Path) -> None:
    projector = tmp_path / "mmproj.gguf"
    projector.write_bytes(tiny_pair[1].read_bytes())
    with lookonce.load(tiny_pair[0], mmproj=projector, store=False, threads=1) as model:
        projector.write_bytes(b"GGUF" + bytes(4096))
        with pytest.raises(ModelFileError, match="was changed while the model was loaded"):
            model.look(picture(1))
        projector.unlink()
        with pytest.raises(ModelFileError, match=r"cannot be read \(No such file"):
            model.look(picture(2))


@pytest.mark.parametrize("flash_attention", [True, False])
def test_a_look_of_huge_rows_spoils_no_later_answer(tiny_pair: Pair, flash_attention: bool) -> None:
    with lookonce.load(tiny_pair[0], store=False, threads=1, flash_attention=flash_attention) as model:
        before = model.ask("What?", [look := model.look(picture(1))], max_tokens=8, temperature=0).text
        huge = replace(look, rows=np.full(look.rows.shape, 3e38, dtype=np.float32), key="0" * 64)
        with pytest.raises(NativeError):
            model.ask("What?", [huge], max_tokens=8)
        assert model.ask("What?", [look], max_tokens=8, temperature=0).text == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_a_forked_child_is_told_to_load_its_own_model(tiny_pair: Pair) -> None:
    code = f"""
import os, lookonce
model = lookonce.load({str(tiny_pair[0])!r}, store=False, threads=2)
model.ask("What?", max_tokens=2)
if os.fork() == 0:
    try:
        model.ask("What?", max_tokens=2)
    except lookonce.ClosedError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "belongs to the process that loaded it" in done.stdout


def test_a_look_tells_the_size_of_its_own_picture(model: Model) -> None:
    red = np.zeros((300, 300, 3), dtype=np.uint8)
    other = np.zeros((303, 303, 3), dtype=np.uint8)
    first, second = model.look(red), model.look(other)
    assert (first.picture_size, second.picture_size) == ((300, 300), (303, 303))
    assert model.look(red).picture_size == (300, 300)


@pytest.mark.parametrize("what", ["FORMAT_VERSION", "versions", "preprocessing", "model"])
def test_a_look_made_under_other_conditions_is_a_miss(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def source() -> str:
        with lookonce.load(tiny_pair[0], mmproj=tiny_pair[1], store=tmp_path, threads=1) as model:
            return model.look(picture(1)).source

    assert [source(), source()] == ["encoded", "store"]
    if what == "FORMAT_VERSION":
        monkeypatch.setattr(looker, "FORMAT_VERSION", 2)
    elif what == "versions":
        monkeypatch.setattr(looker, "versions", lambda: {"libllama": "another"})
    elif what == "preprocessing":
        fit = looker.images.fit
        monkeypatch.setattr(looker.images, "fit", lambda p, rule: replace(fit(p, rule), preprocessing="another"))
    else:
        find = engine.Looker.__init__
        monkeypatch.setattr(
            engine.Looker,
            "__init__",
            lambda self, text, gguf, *rest, **options: find(
                self, text, replace(gguf, metadata={**gguf.metadata, "general.name": "another"}), *rest, **options
            ),
        )
    assert source() == "encoded"


def test_a_note_of_another_form_is_a_miss(tiny_pair: Pair, tmp_path: Path) -> None:
    class Confused(lookonce.Store):
        def recall(self, kind: str, digest: str) -> str | None:
            return "no fingerprint: at all"

    with (
        Confused(tmp_path) as store,
        lookonce.load(tiny_pair[0], mmproj=tiny_pair[1], store=store, threads=1) as model,
    ):
        assert model.look(picture(1)).source == "encoded"


def test_every_turn_of_a_chat_names_the_pictures_of_its_prompt(model: Model) -> None:
    chat = model.chat([picture(1)])
    first = chat.ask("What?", max_tokens=2)
    second = chat.ask("And this?", [picture(2)], max_tokens=2)
    assert len(first.images) == 1
    assert [one.key for one in second.images][:1] == [first.images[0].key]
    assert sum(one.rows for one in second.images) == second.usage.image_rows


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((None,), {}),
        ((b"x",), {}),
        (("",), {}),
        (("a\0b",), {}),
        (("~nobody-of-this-name/x",), {}),
        ((".",), {"store": None}),
        ((".",), {"store": ""}),
        ((".",), {"store": 0}),
        ((".",), {"mmproj": b"x"}),
        ((".",), {"n_gpu_layers": 2**40}),
        ((".",), {"n_gpu_layers": True}),
        ((".",), {"flash_attention": np.array([1, 2])}),
    ],
)
def test_loading_with_something_odd_is_one_of_our_errors(
    tiny_pair: Pair, arguments: tuple[object], options: dict[str, object]
) -> None:
    given = [tiny_pair[0] if one == "." else one for one in arguments]
    with pytest.raises(LookonceError):
        lookonce.load(*given, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"temperature": 10**400}, {"temperature": float("nan")}, {"grammar": b"x"}, {"grammar": 5}]
)
def test_odd_sampling_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(lookonce.PromptError):
        lookonce.Sampling(**options)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(model: Model) -> None:
    reply = model.ask("What?", max_tokens=np.int64(2), temperature=np.float32(0.5), seed=np.int32(1))
    assert reply.usage.generated <= 2


@pytest.mark.parametrize("keyword", ["minimum", "multipleOf", "uniqueItems", "not"])
def test_a_schema_that_a_grammar_cannot_hold_a_reply_to_is_refused(model: Model, keyword: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", keyword: 5}}}
    with pytest.raises(lookonce.PromptError, match=keyword):
        model.ask("What?", json_schema=schema)


def test_a_property_may_be_called_like_such_a_keyword(model: Model) -> None:
    schema = {"type": "object", "properties": {"minimum": {"enum": [1, 2]}}, "required": ["minimum"]}
    assert "minimum" in model.ask("What?", json_schema=schema, max_tokens=60, temperature=0).text


def test_a_picture_that_cannot_be_sized_is_named(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "thread.png"
    Image.fromarray(picture(1, height=2, width=900)).save(path)
    with pytest.raises(lookonce.PictureError, match=r"thread\.png: "):
        model.look(path)
