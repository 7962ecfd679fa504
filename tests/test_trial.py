"""The trial load: a file that llama.cpp dies of costs an error, one that is known to load costs nothing."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf_maker as maker
import lookonce
from card_maker import write_card
from gguf_maker import u32
from lookonce import gguf_file, published, trial
from lookonce.cards import CardFile, find_card
from lookonce.errors import InputError, ModelFileError
from lookonce.model_files import ModelFiles, find_files
from lookonce.store import Store
from lookonce.trial import try_model

Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOOKONCE_TRIAL")


@pytest.fixture
def deadly(tmp_path: Path) -> Path:
    """A text model that passes the header check of its architecture, and trips an assert of llama.cpp's qwen3.cpp."""
    return maker.write_text(tmp_path / "deadly.gguf", "qwen3", {"qwen3.rope.dimension_count": u32(7)})


@pytest.fixture
def pair(tiny_pair: Pair, tmp_path: Path) -> Pair:
    """A sound model that was changed long ago."""
    text, projector = (Path(shutil.copy(path, tmp_path / path.name)) for path in tiny_pair)
    for path in (text, projector):
        os.utime(path, (1e9, 1e9))
    return text, projector


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text model of each child that was started; the children are real."""
    found: list[str] = []
    run = subprocess.run

    def count(arguments: list[str], **options: Any) -> object:
        found.append(arguments[-1])
        return run(arguments, **options)

    monkeypatch.setattr(trial.subprocess, "run", count)
    return found


def refusal(files: ModelFiles) -> str:
    with pytest.raises(ModelFileError) as caught:
        try_model(files, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_llama_cpp_dies_of_is_refused_in_one_sentence_with_its_last_words(deadly: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        lookonce.load(deadly, store=False)
    said = str(caught.value)
    assert said.startswith(f"{deadly} cannot be used, llama.cpp died of SIGABRT in a trial load (qwen3.cpp:")
    assert "GGML_ASSERT(n_embd_head == n_rot) failed): download it again" in said
    assert "\n" not in said


def test_without_the_trial_the_process_itself_would_have_died(deadly: Path) -> None:
    code = (
        "import lookonce, sys; from lookonce.native.text import Context; "
        "engine = lookonce.load(sys.argv[1], store=False, trial=False, threads=1).engine; "
        "Context(engine.text, engine.options)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(deadly)], check=False, capture_output=True)
    assert ended.returncode < 0


def change_last_byte(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\x01")


def test_a_model_is_tried_once_for_each_content(pair: Pair, tmp_path: Path, started: list[str]) -> None:
    for _ in range(2):  # as two processes, one after the other
        lookonce.load(pair[0], store=tmp_path / "store", threads=1).close()
    assert len(started) == 1
    copy = shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("store", "copy"))
    lookonce.load(copy / pair[0].name, store=tmp_path / "store", threads=1).close()
    assert len(started) == 1
    change_last_byte(pair[1])
    lookonce.load(pair[0], store=tmp_path / "store", threads=1).close()
    assert len(started) == 2


def test_a_model_is_tried_again_with_another_version_of_the_library(
    pair: Pair, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store") as store:
        try_model(find_files(pair[0]), store)
        monkeypatch.setattr(trial, "versions", lambda: {"libllama": "next"})
        for _ in range(2):
            try_model(find_files(pair[0]), store)
    assert len(started) == 2


def test_what_was_refused_is_tried_again(deadly: Path, tmp_path: Path, started: list[str]) -> None:
    os.utime(deadly, (1e9, 1e9))
    with Store(tmp_path / "store") as store:
        for _ in range(2):
            with pytest.raises(ModelFileError):
                try_model(find_files(deadly), store)
    assert len(started) == 2


def test_without_a_store_nothing_is_kept_and_every_load_tries(
    pair: Pair, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "own"))
    for _ in range(2):
        lookonce.load(pair[0], store=False, threads=1).close()
    assert len(started) == 2
    assert not (tmp_path / "own").exists()
    lookonce.load(pair[0], threads=1).close()
    lookonce.load(pair[0], store=False, threads=1).close()
    assert len(started) == 3  # the user's own store knows it now


def test_a_store_that_cannot_be_written_to_is_no_hindrance(pair: Pair, started: list[str]) -> None:
    for _ in range(2):
        lookonce.load(pair[0], store="/proc/lookonce", threads=1).close()
    assert len(started) == 2


def test_files_that_a_card_vouches_for_are_not_tried(
    pair: Pair, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tmp_path))
    write_card(tmp_path / "own.toml", *pair)
    for store in (tmp_path / "store", False):
        lookonce.load("tiny", store=store, threads=1).close()
    lookonce.load(pair[0], store=tmp_path / "store", threads=1).close()
    assert started == []
    change_last_byte(pair[0])  # of the right name and size
    lookonce.load(pair[0], store=tmp_path / "store", threads=1).close()
    assert len(started) == 1


def test_a_hash_that_the_hub_told_when_the_file_was_fetched_vouches_too(
    pair: Pair, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    told = write_card(tmp_path / "own.toml", *pair)
    plain = (tmp_path / "own.toml").read_text().splitlines()
    (tmp_path / "own.toml").write_text(
        "\n".join(line.partition(", size")[0] + " }" * (", size" in line) for line in plain)
    )
    card = find_card("tiny")
    assert card is not None
    assert card.text_file() == CardFile(pair[0].name)
    lookonce.load("tiny", store=tmp_path / "one", threads=1).close()
    assert len(started) == 1
    for file in (told.text_file(), told.projector_file()):
        published.remember("me/Tiny.GGUF", file)
    lookonce.load("tiny", store=tmp_path / "two", threads=1).close()
    assert len(started) == 1


@pytest.mark.parametrize("part", ["text", "projector"])
def test_weights_that_are_no_numbers_are_found_before_they_can_hurt(pair: Pair, part: str) -> None:
    path, name = (pair[0], "output_norm.weight") if part == "text" else (pair[1], "mm.2.bias")
    tensor = gguf_file.read(path).tensors[name]
    data = bytearray(path.read_bytes())
    weights: NDArray[np.float32] = np.frombuffer(data, np.float32, tensor.size_bytes // 4, tensor.offset)
    weights[:] = np.nan
    path.write_bytes(data)
    assert "the file is damaged, fetch it again" in refusal(find_files(pair[0]))
    assert str(path) in refusal(find_files(pair[0]))


def test_a_projector_that_llama_cpp_dies_of_is_the_one_that_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No such file is known: the child's own death stands for it, when it is told to load the projector.
    monkeypatch.setattr(
        trial,
        "_CHILD",
        trial._CHILD.replace(
            "run_child(given)",
            "import os, lookonce.trial as t; t.VisionTower = lambda *_, **__: os.abort(); run_child(given)",
        ),
    )
    assert refusal(find_files(pair[0])).startswith(f"{pair[1]} cannot be used, llama.cpp died of SIGABRT")


def test_the_child_finds_what_the_caller_found(pair: Pair, tmp_path: Path) -> None:
    # A copy of the package that only the caller's sys.path knows, and whose child leaves a mark.
    package = shutil.copytree(Path(trial.__file__).parent, tmp_path / "elsewhere" / "lookonce")
    with (package / "trial.py").open("a") as file:
        file.write(
            f"\n_tell_all = _tell\ndef _tell(**facts): Path({str(tmp_path / 'mark')!r}).touch(); _tell_all(**facts)\n"
        )
    source = Path(trial.__file__).parent.parent.parent
    shutil.copy(source / "models.toml", tmp_path / "elsewhere" / "lookonce")
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r}); "
        "import lookonce; lookonce.load(sys.argv[1], store=False)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, str(pair[0])], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("python", ["/nonexistent", "/bin/true", "/bin/false", None, ""])
def test_where_no_child_can_be_had_the_model_loads_without_a_trial(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with caplog.at_level(logging.INFO, "lookonce.trial"):
        for _ in range(2):
            lookonce.load(pair[0], store=tmp_path / "store", threads=1).close()
    assert [record.message.startswith(f"no trial of {pair[0]}: ") for record in caplog.records] == [True, True]


def test_a_child_that_does_not_end_is_ended(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(trial, "_LEAST_S", 0.5)
    started = time.monotonic()
    assert "was not loaded within 2 s in a trial" in refusal(find_files(pair[0]))
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_trial_can_be_left_out(pair: Pair, started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lookonce.load(pair[0], store=False, threads=1, trial=False).close()
    monkeypatch.setenv("LOOKONCE_TRIAL", "0")
    lookonce.load(pair[0], store=False, threads=1).close()
    assert started == []
    lookonce.load(pair[0], store=False, threads=1, trial=True).close()
    assert len(started) == 1
    monkeypatch.setenv("LOOKONCE_TRIAL", "off")
    with pytest.raises(InputError, match="LOOKONCE_TRIAL is 'off': set it to 0 or 1"):
        lookonce.load(pair[0], store=False, threads=1)


def test_a_model_of_another_family_is_tried_too(tmp_path: Path) -> None:
    assert (
        try_model(ModelFiles(gguf_file.read(maker.write_text(tmp_path / "a.gguf", "qwen3")), None, None), None) is None
    )


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_a_later_load_reads_no_file_through(pair: Pair, tmp_path: Path) -> None:
    def bytes_read() -> int:  # by system calls, from the disk or the page cache, by this process and its children
        return int(Path("/proc/self/io").read_text().split()[1])

    read = []
    for _ in range(3):
        before = bytes_read()
        lookonce.load(pair[0], store=tmp_path / "store", threads=1).close()
        read.append(bytes_read() - before)
    smaller = min(path.stat().st_size for path in pair)
    assert read[0] > sum(path.stat().st_size for path in pair)
    assert max(read[1:]) < smaller


def test_an_application_that_holds_python_is_not_started_once_more(
    pair: Pair, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    try_model(find_files(pair[0]), None)
    assert started == []


def test_a_child_that_is_such_an_application_tries_nothing_itself(pair: Pair, tmp_path: Path) -> None:
    # It ignores what it is told, as an embedding program does, and loads its model, a trial and all.
    app = tmp_path / "app"
    app.write_text(f"#!/bin/sh\necho begun >> {tmp_path}/begun\nexec {sys.executable} {tmp_path}/app.py\n")
    app.chmod(0o755)
    (tmp_path / "app.py").write_text(
        f"import sys, lookonce; sys.executable = {str(app)!r}\n"
        f"lookonce.load({str(pair[0])!r}, store=False, threads=1, trial=True).close()\n"
    )
    subprocess.run([str(app)], check=True, timeout=60)
    assert (tmp_path / "begun").read_text().split() == ["begun"] * 2


def test_the_present_folders_modules_are_not_run(
    pair: Pair, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for name in ("json", "resource"):
        (tmp_path / "here" / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    try_model(find_files(pair[0]), None)
    assert len(started) == 1
    assert not (tmp_path / "mark").exists()


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let a shell script stand for the child."""
    (folder / "child").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "child").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "child"))


@pytest.mark.parametrize(
    ("signal", "said"),
    [
        ("KILL", "was not loaded, its trial load was ended by SIGKILL, as the system does where memory runs out: free"),
        ("TERM", "was not loaded, its trial load was ended by SIGTERM from outside: load it again"),
        ("ILL", "cannot be loaded, llama.cpp died of SIGILL in a trial load (it said nothing): it was built for"),
        ("SEGV", "cannot be used, llama.cpp died of SIGSEGV in a trial load (it said nothing): download it again"),
    ],
)
def test_only_llama_cpps_own_deaths_are_the_files_fault(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str, said: str
) -> None:
    child(monkeypatch, tmp_path, f"ulimit -c 0; kill -s {signal} $$")
    assert refusal(find_files(pair[0])).startswith(f"{pair[0]} {said}")


def test_a_child_that_had_begun_and_ends_without_a_word_has_found_the_file_bad(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a crash on Windows, and any Python error on the way.
    child(monkeypatch, tmp_path, f'echo \'{{"file": "{pair[1]}"}}\'; echo MemoryError >&2; exit 3')
    said = refusal(find_files(pair[0]))
    assert said.startswith(f"{pair[1]} cannot be used, a trial load of it ended with status 3 (MemoryError): ")


def test_a_child_that_could_not_begin_is_told_of_in_a_warning(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    child(monkeypatch, tmp_path, "echo 42; echo 'ImportError: no lookonce' >&2; exit 1")
    try_model(find_files(pair[0]), None)
    assert [(one.levelname, one.message) for one in caplog.records if one.name == "lookonce.trial"] == [
        ("WARNING", f"no trial of {pair[0]}: the child ended with 1: ImportError: no lookonce")
    ]


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_replaced_during_the_trial_is_not_loaded_and_not_taken_for_tried(
    pair: Pair, deadly: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    files = find_files(pair[0])
    real = trial._try_in_child

    def try_and_replace(files: ModelFiles, parts: list[gguf_file.GgufFile]) -> bool:
        loaded = real(files, parts)
        deadly.replace(pair[part])
        return loaded

    noted: list[str] = []
    with Store(tmp_path / "store") as store, monkeypatch.context() as patch:
        patch.setattr(trial, "_try_in_child", try_and_replace)
        patch.setattr(store, "remember", lambda kind, *_: noted.append(kind))
        with pytest.raises(ModelFileError, match="was changed while the model was loaded"):
            try_model(files, store)
    assert "trial" not in noted


def test_a_text_model_replaced_after_the_trial_never_reaches_native_code(
    pair: Pair, deadly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def try_and_replace(files: ModelFiles, store: Store | None) -> None:
        try_model(files, store)
        deadly.replace(pair[0])

    def load(*_: object, **__: object) -> None:
        raise AssertionError("it reached native code")

    monkeypatch.setattr("lookonce.model.try_model", try_and_replace)
    monkeypatch.setattr("lookonce.engine.TextModel", load)
    with pytest.raises(ModelFileError, match="was changed while the model was loaded"):
        lookonce.load(pair[0], store=False, threads=1)
