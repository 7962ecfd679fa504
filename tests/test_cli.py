import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lookonce import cli, doctor, model
from lookonce.embedding import ImageEmbedding

FAST = ("--temperature", "0", "--max-tokens", "8", "--n-ctx", "1024", "--threads", "1")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(7).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 200)).save(path)
    return path


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a store of its own inside it."""
    for name in ("LOOKONCE_MODEL", "LOOKONCE_MMPROJ", "LOOKONCE_MODELS_DIR", "LOOKONCE_STORE_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "80")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture(scope="module")
def saved(tiny_pair: tuple[Path, Path], photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photo's look, saved by the command line in a process of its own."""
    target = tmp_path_factory.mktemp("saved") / "photo.safetensors"
    run = run_process("look", photo, "--model", tiny_pair[0], "--no-store", "--output", target)
    assert (run.returncode, run.stderr) == (0, "")
    return target


@pytest.fixture(scope="module")
def lone_text(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text model in a folder without a projector."""
    path = tmp_path_factory.mktemp("alone") / tiny_pair[0].name
    path.symlink_to(tiny_pair[0])
    return path


def run_process(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lookonce", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload]


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_saved_look_asked_about_without_projector_answers_as_the_photo_does_without_store(
    tiny_pair: tuple[Path, Path], lone_text: Path, photo: Path, saved: Path
) -> None:
    replayed = run_process("ask", "What is it?", "-i", saved, "--model", lone_text, "--json", *FAST)
    fresh = run_process(
        "ask",
        "What is it?",
        "-i",
        photo,
        "--model",
        tiny_pair[0],
        "--mmproj",
        tiny_pair[1],
        "--no-store",
        "--json",
        *FAST,
    )
    other = run_process("ask", "What is it?", "--model", lone_text, "--json", *FAST)
    answers = [json.loads(run.stdout) for run in (replayed, fresh, other)]
    assert answers[0]["text"] == answers[1]["text"] != answers[2]["text"]
    assert [answer["images"][0]["source"] for answer in answers[:2]] == ["file", "encoded"]
    assert answers[0]["images"][0]["key"] == answers[1]["images"][0]["key"]
    assert [run.stderr for run in (replayed, fresh, other)] == ["", "", ""]


def test_the_second_ask_reads_the_store_and_loads_no_tower(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path
) -> None:
    ask = ("ask", "Where?", "-i", photo, "--model", tiny_pair[0], "--json", "--verbose", *FAST)
    runs = [run_here(capsys, *ask) for _ in range(2)]
    first, second = (json.loads(out) for _, out, _ in runs)
    assert ["loaded the vision tower" in err for _, _, err in runs] == [True, False]
    assert [one["images"][0]["source"] for one in (first, second)] == ["encoded", "store"]
    assert first["text"] == second["text"]


def test_the_json_answer_has_exactly_the_promised_fields(
    capsys: pytest.CaptureFixture[str], lone_text: Path, saved: Path
) -> None:
    status, out, err = run_here(capsys, "ask", "What?", "-i", saved, "--model", lone_text, "--json", *FAST)
    answer = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert set(answer) == {"text", "finish_reason", "usage", "timings", "images"}
    assert [set(image) for image in answer["images"]] == [{"key", "source", "rows"}]
    assert answer["usage"]["image_rows"] == answer["images"][0]["rows"]
    assert set(answer["usage"]) == {"text_tokens", "image_rows", "generated", "reused", "prefix"}
    assert answer["usage"]["generated"] == 8


def test_states_are_kept_as_told(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path, tmp_path: Path
) -> None:
    for path in tiny_pair:
        os.utime(shutil.copy(path, tmp_path), (1e9, 1e9))  # so old that its fingerprint is remembered
    ask = ("ask", "Where?", "-i", photo, "--model", tmp_path, "--json", *FAST)
    origins = []
    for mode in ("read", "on", "off", "read", "on"):
        status, out, err = run_here(capsys, *ask, "--state", mode)
        assert (status, err) == (0, "")
        origins.append(json.loads(out)["usage"]["prefix"])
    assert origins == ["evaluated", "evaluated", "evaluated", "store", "store"]
    status, _, err = run_here(capsys, *ask, "--state", "never")
    assert (status, err.count("\n")) == (2, 1)
    assert "state is 'never': choose one of off, read, on" in err


def test_the_streamed_answer_is_the_json_answer_and_a_newline(
    capsys: pytest.CaptureFixture[str], lone_text: Path, saved: Path
) -> None:
    ask = ("ask", "What?", "-i", saved, "--model", lone_text, *FAST)
    assert run_here(capsys, *ask)[:2] == (0, json.loads(run_here(capsys, *ask, "--json")[1])["text"] + "\n")


def test_a_dash_reads_the_prompt_from_stdin(lone_text: Path, saved: Path) -> None:
    common = ("-i", saved, "--model", lone_text, *FAST)
    piped = run_process("ask", "-", *common, input="What é?\n")
    assert piped.stdout == run_process("ask", "What é?", *common).stdout != ""


def test_sampling_options_reach_the_model(
    capsys: pytest.CaptureFixture[str], lone_text: Path, surroundings: Path
) -> None:
    schema = '{"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}'
    Path("schema.json").write_text(schema)
    Path("grammar.gbnf").write_text('root ::= "yes"')
    ask = ("ask", "What?", "--model", lone_text, *FAST, "--max-tokens", "40")
    assert json.loads(run_here(capsys, *ask, "--json-schema", schema)[1]) == {"a": 7}
    assert json.loads(run_here(capsys, *ask, "--json-schema", "schema.json")[1]) == {"a": 7}
    assert run_here(capsys, *ask, "--grammar", "grammar.gbnf")[1] == "yes\n"
    assert run_here(capsys, *ask, "--grammar", "grammar.gbnf", "--stop", "e")[1] == "y\n"


def test_an_answer_that_is_cut_off_says_so_on_stderr_and_a_whole_one_says_nothing(
    capsys: pytest.CaptureFixture[str], lone_text: Path, surroundings: Path
) -> None:
    Path("grammar.gbnf").write_text('root ::= "yes"')
    ask = ("ask", "What?", "--model", lone_text, *FAST)
    assert run_here(capsys, *ask, "--grammar", "grammar.gbnf", "--max-tokens", "40") == (0, "yes\n", "")
    status, out, err = run_here(capsys, *ask, "--json-schema", '{"type": "string"}', "--max-tokens", "3")
    assert (status, out[0]) == (0, '"')
    assert err == "lookonce: warning: the answer is cut off after 3 tokens: --max-tokens gives it more\n"
    assert run_here(capsys, *ask, "--max-tokens", "3", "--json")[2] == ""


def test_looks_of_several_pictures_go_to_a_folder_under_their_names(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path, surroundings: Path
) -> None:
    Image.open(photo).save("copy.bmp")
    status, out, err = run_here(
        capsys, "look", photo, "copy.bmp", "--model", tiny_pair[0], "--output", "looks/", "--json", "--dtype", "f32"
    )
    first, second = (json.loads(line) for line in out.splitlines())
    assert (status, err) == (0, "")
    assert sorted(path.name for path in Path("looks").iterdir()) == ["copy.safetensors", "photo.safetensors"]
    assert (first["source"], second["source"]) == ("encoded", "store")
    assert first["key"] == second["key"] == ImageEmbedding.load("looks/copy.safetensors").key
    assert ImageEmbedding.load(first["output"]).rows.dtype == np.float32


def test_a_bad_picture_among_several_stops_before_any_work(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_pair: tuple[Path, Path],
    photo: Path,
) -> None:
    monkeypatch.setattr(model, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    Path("bad.png").write_bytes(photo.read_bytes()[:-500])
    refused(capsys, "look", photo, "bad.png", "--model", tiny_pair[0], "--output", "looks/")


@pytest.mark.parametrize(
    "arguments",
    [
        ("a/cat.png", "b/cat.jpg", "--output", "looks/"),
        ("a/cat.png", "b/CAT.png", "--output", "."),
        ("cat.png", "dog.png", "--output", "look.safetensors"),
        ("cat.png", "--output", "look.bin"),
        ("cat.png", "--output", "nowhere/look.safetensors"),
        ("cat.png", "--output", "nowhere/looks/"),
        ("cat.png", "--no-store"),
        ("cat.png", "--no-store", "--store", "there"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], photo: Path, arguments: tuple[str, ...]
) -> None:
    for name in ("a/cat.png", "b/cat.jpg", "b/CAT.png", "cat.png", "dog.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.open(photo).save(name)
    refused(capsys, "look", *arguments, "--model", "missing.gguf", unless="missing.gguf")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, unless: str = "Traceback") -> str:
    """Run what must be refused: status 2, one line on stderr, nothing printed and nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    status, out, err = run_here(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("lookonce: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert unless not in err
    assert sorted(Path.cwd().rglob("*")) == before
    assert not list(Path(os.environ["LOOKONCE_STORE"]).rglob("objects/*"))
    return err


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def truncated_jpeg(photo: Path) -> bytes:
    Image.open(photo).save("whole.jpg")
    return Path("whole.jpg").read_bytes()[:2000]


BAD_PICTURES: dict[str, Callable[[Path], bytes]] = {
    "no image": lambda _: b"hello, I am a text",
    "truncated": truncated_jpeg,
    "empty": lambda _: b"",
    "huge": lambda _: png_of_size(100_000, 100_000),
    "truncated PNG": lambda photo: photo.read_bytes()[:1000],
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
@pytest.mark.parametrize("command", ["ask", "look"])
def test_a_bad_picture_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path, kind: str, command: str
) -> None:
    Path("bad.jpg").write_bytes(BAD_PICTURES[kind](photo))
    head = ("ask", "What?", "-i") if command == "ask" else ("look", "--output", "look.safetensors")
    assert "bad.jpg" in refused(capsys, *head, "bad.jpg", "--model", tiny_pair[0])


def with_rows(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A saved look whose checksum is right although its rows were changed past every check."""
    look = dataclasses.replace(ImageEmbedding.load(path))
    object.__setattr__(look, "rows", np.ascontiguousarray(change(np.array(look.rows))))
    return look.to_bytes()


def spoil(rows: np.ndarray) -> np.ndarray:
    rows[3, 3] = np.nan
    return rows


def flip(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


BAD_LOOKS: dict[str, Callable[[Path], bytes]] = {
    "of another width": lambda path: with_rows(path, lambda rows: rows[:, :96]),
    "with NaN": lambda path: with_rows(path, spoil),
    "with a flipped byte": lambda path: flip(path.read_bytes(), -1000),
    "with a flipped header": lambda path: flip(path.read_bytes(), 3),
    "cut short": lambda path: path.read_bytes()[:-7],
    "of no bytes": lambda _: b"",
}


def test_looks_that_the_store_did_not_keep_are_status_1(
    capsys: pytest.CaptureFixture[str],
    tiny_pair: tuple[Path, Path],
    photo: Path,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOOKONCE_STORE_LIMIT", "1000")
    status, out, err = run_here(capsys, "look", photo, saved, "--model", tiny_pair[0])
    assert status == 1
    assert len(out.splitlines()) == 2
    assert f"the store kept no look of {photo}: mend the store, or give --output" in err
    status, _, err = run_here(capsys, "look", photo, "--model", tiny_pair[0], "--output", "photo.safetensors")
    assert status == 0


def test_a_file_as_the_store_is_wrong_use(capsys: pytest.CaptureFixture[str], photo: Path) -> None:
    for command in (("store", "stats"), ("ask", "What?", "--model", "demo")):
        status, _, err = run_here(capsys, *command, "--store", photo)
        assert status == 2
        assert "is a file" in err


@pytest.mark.parametrize("kind", BAD_LOOKS)
def test_a_bad_saved_look_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], lone_text: Path, saved: Path, kind: str
) -> None:
    Path("bad.safetensors").write_bytes(BAD_LOOKS[kind](saved))
    refused(capsys, "ask", "What?", "-i", "bad.safetensors", "--model", lone_text)


BAD_MODELS: dict[str, Callable[[Path, Path], tuple[Path | bytes, Path | bytes]]] = {
    "a text model as projector": lambda text, _: (text, text),
    "a projector as text model": lambda _, projector: (projector, projector),
    "a truncated text model": lambda text, projector: (text.read_bytes()[:-1000], projector),
    "a truncated projector": lambda text, projector: (text, projector.read_bytes()[:5000]),
    "a text model with a flipped header": lambda text, projector: (flip(text.read_bytes(), 9), projector),
    "a projector with a flipped header": lambda text, projector: (text, flip(projector.read_bytes(), 17)),
    "a missing text model": lambda text, projector: (text.with_name("none.gguf"), projector),
    "a missing projector": lambda text, projector: (text, projector.with_name("none.gguf")),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_file_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path, kind: str
) -> None:
    files = []
    for name, made in zip(("text.gguf", "mmproj.gguf"), BAD_MODELS[kind](*tiny_pair), strict=True):
        if isinstance(made, bytes):
            Path(name).write_bytes(made)
        files.append(name if isinstance(made, bytes) else made)
    refused(capsys, "ask", "What?", "-i", photo, "--model", files[0], "--mmproj", files[1])


def test_a_projector_of_another_width_or_family_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_pair: tuple[Path, Path],
    tiny_pair_25: tuple[Path, Path],
    photo: Path,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    from lookonce.synthetic.gguf_pair import write_projector
    from lookonce.synthetic.pair import make_weights
    from lookonce.synthetic.shape import find_shape

    shape = find_shape("qwen3vl", "tiny")
    wide = dataclasses.replace(shape, text=dataclasses.replace(shape.text, hidden_size=320))
    write_projector(Path("wide.gguf"), wide, make_weights(wide)[0], type="F32", name="Qwen3-VL wide")
    ask = ("ask", "What?", "-i", photo, "--model", tiny_pair[0], "--mmproj")
    assert "960" in refused(capsys, *ask, "wide.gguf")
    assert "qwen2.5vl" in refused(capsys, *ask, tiny_pair_25[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("Look at <image_2>.",), "<image_2>"),
        (("x" * 5000, "--n-ctx", "256"), "256"),
        (("What?", "--device", "cuda:9"), "cuda:9"),
        (("What?", "--device", "toaster"), "toaster"),
        (("What?", "--kv-type", "q3"), "q3"),
        (("What?", "--n-ctx", "0"), "n_ctx"),
        (("What?", "--temperature", "-1"), "temperature"),
        (("What?", "--max-tokens", "many"), "--max-tokens"),
        (("What?", "--grammar", "none.gbnf"), "none.gbnf"),
        (("What?", "--json-schema", "{"), "JSON"),
        (("What?", "--flash-attention", "--no-flash-attention"), "--flash-attention"),
        (("What?", "--bogus"), "--bogus"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], lone_text: Path, saved: Path, arguments: tuple[str, ...], told: str
) -> None:
    assert told in refused(capsys, "ask", *arguments, "-i", saved, "--model", lone_text)


def test_a_message_is_one_printable_line_whatever_a_file_is_called(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path]
) -> None:
    told = refused(capsys, "ask", "What?", "-i", "no\nsuch\x1b[31m.png", "--model", tiny_pair[0])
    assert "no such" in told or "no\\nsuch" in told
    assert "\x1b" not in told


def test_an_empty_prompt_without_picture_is_refused_and_with_one_it_is_not(
    capsys: pytest.CaptureFixture[str], lone_text: Path, saved: Path
) -> None:
    assert "empty" in refused(capsys, "ask", " ", "--model", lone_text)
    assert run_here(capsys, "ask", "", "-i", saved, "--model", lone_text, *FAST)[0] == 0


@pytest.mark.parametrize("arguments", [("ask", "What?"), ("look", "photo.png")])
def test_without_a_model_one_line_says_how_to_give_one(
    capsys: pytest.CaptureFixture[str], photo: Path, arguments: tuple[str, ...]
) -> None:
    Path("photo.png").write_bytes(photo.read_bytes())
    told = refused(capsys, *arguments)
    assert all(way in told for way in ("LOOKONCE_MODEL", "`lookonce pull qwen3-vl-2b-instruct`", "--model demo"))


@pytest.mark.parametrize("arguments", [("frob",), ("ask",), ("look",), ("store", "frob"), ("--frob",)])
def test_wrong_use_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert "--help" in refused(capsys, *arguments)


def test_an_unexpected_failure_is_one_line_and_status_1_and_verbose_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the\nsky fell")

    monkeypatch.setattr(model, "load", fail)
    line = "lookonce: RuntimeError: the sky fell (run again with --verbose to see more)\n"
    assert run_here(capsys, "ask", "What?", "--model", "x") == (1, "", line)
    status, out, err = run_here(capsys, "ask", "What?", "--model", "x", "--verbose")
    assert (status, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith(line)


def test_what_the_store_cannot_keep_is_a_warning_each_and_the_answer_comes(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path
) -> None:
    Path("broken").mkdir()
    Path("broken/tmp").write_text("where a folder should be")
    status, out, err = run_here(
        capsys, "ask", "What?", "-i", photo, "--model", tiny_pair[0], "--store", "broken", *FAST
    )
    assert (status, out.count("\n"), err.count("\n")) == (
        0,
        1,
        3,
    )  # the look, the state, and that the answer is cut off
    assert all(line.startswith("lookonce: warning: ") for line in err.splitlines())


def test_help_is_complete_and_loads_no_native_library() -> None:
    code = """
import sys
from lookonce.cli import main
for command in (["look"], ["ask"], ["store", "clear"], ["doctor"], ["demo"], []):
    assert main([*command, "--help"]) == 0
assert "llama_cpp" not in sys.modules, "llama_cpp"
assert "numpy" not in sys.modules, "numpy"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    for told in ("--output", "--json-schema", "--yes", "LOOKONCE_MODEL", "--save-picture", "doctor"):
        assert told in run.stdout


def test_no_arguments_show_the_help_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(capsys)
    assert (status, err) == (0, "")
    assert "Usage" in out
    assert run_here(capsys, "store")[0] == 0
    assert run_here(capsys, "--version")[:2] == (0, f"lookonce {cli.VERSION}\n")


def test_the_store_is_counted_checked_pruned_and_cleared(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path
) -> None:
    run_here(capsys, "look", photo, "--model", tiny_pair[0])
    stats = json.loads(run_here(capsys, "store", "stats", "--json")[1])
    assert stats["entries"] == stats["kinds"]["look"]["entries"] == 1
    assert "entries: 1, " in run_here(capsys, "store", "stats")[1]
    assert run_here(capsys, "store", "check")[:2] == (0, "entries read: 1, sound\n")
    (entry,) = (path for path in Path(os.environ["LOOKONCE_STORE"], "objects").rglob("*") if path.is_file())
    entry.write_bytes(flip(entry.read_bytes(), -9))
    assert "lookonce store check --repair deletes what is damaged" in run_here(capsys, "store", "check")[1]
    status, out, _ = run_here(capsys, "store", "check", "--json")
    assert (status, json.loads(out)["sound"], len(json.loads(out)["corrupt"])) == (1, False, 1)
    assert run_here(capsys, "store", "check", "--repair")[0] == 0
    run_here(capsys, "look", photo, "--model", tiny_pair[0])
    assert run_here(capsys, "store", "prune", "--limit", "1KB")[0] == 0
    assert json.loads(run_here(capsys, "store", "stats", "--json")[1])["entries"] == 0


def test_clearing_the_store_needs_a_yes(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], photo: Path
) -> None:
    run_here(capsys, "look", photo, "--model", tiny_pair[0])
    refused_run = run_process("store", "clear", stdin=subprocess.DEVNULL)
    assert (refused_run.returncode, refused_run.stdout, refused_run.stderr.count("\n")) == (2, "", 1)
    assert json.loads(run_here(capsys, "store", "stats", "--json")[1])["entries"] == 1
    assert run_here(capsys, "store", "clear", "--yes")[0] == 0
    assert json.loads(run_here(capsys, "store", "stats", "--json")[1])["entries"] == 0


@pytest.mark.parametrize("size", ["lots", "-1", "5XB", ""])
def test_a_limit_that_is_no_size_is_refused(capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert "500MB" in refused(capsys, "store", "prune", "--limit", size)


def test_the_doctor_finds_models_and_proves_that_a_picture_matters(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path]
) -> None:
    Path("cut.gguf").write_bytes(tiny_pair[0].read_bytes()[:3000])
    status, out, _ = run_here(capsys, "doctor", "--model", tiny_pair[0], "--threads", "1", "--json")
    report = json.loads(out)
    kinds = {Path(one["path"]).name: one["kind"] for one in report["models"]}
    text = next(one for one in report["models"] if one["kind"] == "text")
    assert (status, report["check"]["passed"]) == (0, True)
    assert kinds == {tiny_pair[0].name: "text", tiny_pair[1].name: "projector", "cut.gguf": "damaged"}
    assert Path(text["projector"]).name == tiny_pair[1].name
    assert report["store"]["writable"] is True
    assert report["native"]["threads"] >= 1


def test_the_doctor_finds_the_model_in_the_package_sound(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(capsys, "doctor", "--model", "demo", "--threads", "1")
    assert (status, err) == (0, "")
    assert re.search(r"red circle on white +'a red circle at the center on a white background'\n", out)
    assert re.search(r"yellow square on black +'a yellow square at the center on a black background'\n", out)


def test_the_doctor_without_a_model_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(capsys, "doctor")
    assert (status, err) == (0, "")
    assert "none found" in out or "/models" in out


def test_the_doctor_fails_where_a_picture_changes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.SelfCheck("deaf", "a shape", "a shape", "nothing", (0.5, 0.5, 0.5))
    monkeypatch.setattr(doctor, "check_model", lambda _: found)
    status, out, _ = run_here(capsys, "doctor", "--model", "x")
    assert status == 1
    assert "Check of 'deaf': FAILED" in out


def test_a_closed_pipe_ends_the_stream_quietly(lone_text: Path) -> None:
    command = [sys.executable, "-m", "lookonce", "ask", "What?", "--model", str(lone_text), "--max-tokens", "900"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(4)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141
    process.stderr.close()


def interrupt(command: list[str], *, stderr: int) -> tuple[int, float]:
    """Start a program, send it Ctrl-C after its first output, and give its status and how long it then took."""
    # A shell may have started the tests with Ctrl-C ignored, which a child would inherit.
    first = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", first, *command], stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.read(3)
        time.sleep(0.3)  # what follows the output is native code, and it has to have begun
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
    return status, time.monotonic() - started


def test_ctrl_c_stops_a_stream(lone_text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lookonce", "ask", "What?", "--model", str(lone_text), "--max-tokens", "9000"]
    with (tmp_path / "stderr").open("w+b") as stderr:
        status, seconds = interrupt(command, stderr=stderr.fileno())
    assert (status, (tmp_path / "stderr").read_bytes()) == (130, b"lookonce: interrupted\n")
    assert seconds < 5


def test_ctrl_c_ends_the_program_inside_native_code_and_shows_the_cursor_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The hash stands for a native call of minutes that, like llama.cpp's, lets other threads run.
    code = """
import hashlib, sys
import lookonce.cli, lookonce.model
def load(*_, **__):
    print("in", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
lookonce.model.load = load
sys.exit(lookonce.cli.main(["ask", "x", "--model", "y"]))
"""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    status, seconds = interrupt([sys.executable, "-c", code], stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a pty whose other end is closed ends so
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert status == 130
    assert seconds < 5
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"lookonce: interrupted" in shown


def test_the_doctor_looks_where_models_are_looked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_pair: tuple[Path, Path]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    own = tmp_path / "data" / "lookonce" / "models" / "mine"
    cached = tmp_path / "hub" / "hub" / "models--Qwen--Qwen3-VL-2B-Instruct-GGUF" / "snapshots" / "abc"
    (tmp_path / "blobs").mkdir()
    for folder in (own, cached):
        folder.mkdir(parents=True)
    shutil.copy(tiny_pair[0], own / "text.gguf")
    shutil.copy(tiny_pair[1], tmp_path / "blobs" / "0123")
    (cached / "mmproj.gguf").symlink_to(tmp_path / "blobs" / "0123")
    status, out, _ = run_here(capsys, "doctor")
    assert status == 0
    assert str(own / "text.gguf") in out
    assert str(cached / "mmproj.gguf") in out
