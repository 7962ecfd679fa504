import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lookonce.embed_input import Row, Source, read_rows
from lookonce.embed_run import embed_rows, format_vector
from lookonce.errors import InputError, ModelFileError
from lookonce.item import number_error
from lookonce.part_file import PartFile, check_output

OPTIONS = {"pooling": "last", "layer": -1}


class FakeEmbedder:
    """Vectors that depend on the text and on what else is in the batch, as rounding makes real ones do.

    To be called as what makes an embedder: each may be used for one batch.
    """

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.fresh = False

    def __call__(self) -> "FakeEmbedder":
        self.fresh = True
        return self

    def __enter__(self) -> "FakeEmbedder":
        return self

    def __exit__(self, *_: object) -> None:
        self.fresh = False

    def embed_batch(self, items: Sequence[dict[str, str]], *, batch_size: int) -> np.ndarray:
        assert self.fresh, "a batch has to have an embedder of its own"
        assert batch_size == len(items)
        self.fresh = False
        texts = [item["text"] for item in items]
        for number, text in enumerate(texts):
            if "bad" in text:
                error = InputError("it is bad\nthrough and through")
                raise number_error(error, number) from error
        self.batches.append(texts)
        return np.array([[len(text), ord(text[-1]), len(texts) + 0.1] for text in texts], dtype=np.float32)


def text_rows(texts: Sequence[str]) -> Iterator[Row]:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    return read_rows(io.BytesIO(lines))


def run(target: Path, texts: Sequence[str], *, skip_errors: bool = True, **changed: Any) -> tuple[FakeEmbedder, int]:
    """A whole run as the command makes it; its embedder, and how many rows were done before."""
    embedder = FakeEmbedder()
    rows = text_rows(texts)
    restart = changed.pop("restart", False)
    with PartFile(target, OPTIONS | changed, restart=restart) as part:
        resumed = part.resume(rows)
        embed_rows(embedder, rows, part, batch_size=4, skip_errors=skip_errors)  # type: ignore[arg-type]
    return embedder, resumed


TEXTS = [f"text {number}" for number in range(9)] + ["a bad one", "another", "bad"] + list("fghijk")


def test_rows_of_lines_have_places_labels_and_ids() -> None:
    lines = b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"id": 7, "image": "b", "text": null}\n{"id": "x", "images": ["c"]}'
    rows = list(read_rows(io.BytesIO(lines)))
    assert [(row.index, row.label, row.id, row.problem) for row in rows] == [
        (0, "line 1", None, ""),
        (1, "line 4", 7, ""),
        (2, "line 5", "x", ""),
    ]
    assert [row.item for row in rows] == [{"text": "a"}, {"image": "b"}, {"images": ["c"]}]
    assert [row.pictures for row in rows] == [(), ("b",), ("c",)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"hello", "not JSON"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "beyond all measure"),
        (b"9" * 5000, "measure" if sys.version_info >= (3, 11) else "a number"),
        (b'"text"', "it is a text"),
        (b"null", "it is null"),
        (b"{}", "neither"),
        (b'{"images": []}', "neither"),
        (b'{"id": 1}', "neither"),
        (b'{"text": " "}', "empty"),
        (b'{"text": 5}', "its text is a number"),
        (b'{"text": "a", "image": ""}', "its image is empty"),
        (b'{"image": [1, 2]}', "its image is a list"),
        (b'{"images": "a.png"}', "its images are a text"),
        (b'{"images": ["a.png", false]}', "one of its images is true or false"),
        (b'{"text": "a", "txt": "b"}', "'txt'"),
        (b'{"text": "a", "instruction": {}}', "its instruction is an object"),
        (b'{"text": "a", "id": 1.5}', "its id is a number"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_the_next_is_read(line: bytes, told: str) -> None:
    bad, good = read_rows(io.BytesIO(line + b'\n{"text": "good"}\n'))
    assert told in bad.problem
    assert (bad.item, bad.pictures) == (None, ())
    assert (good.item, good.index, good.label) == ({"text": "good"}, 1, "line 2")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookonce.embed_input._MAX_LINE_BYTES", 20)
    with pytest.raises(InputError, match="line 2 is longer"):
        list(read_rows(io.BytesIO(b'{"text": "a"}\n{"text": "aaaaaaaaaaaaaaaaa"}\n')))


@given(
    hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.none() | st.integers() | st.text(),
)
def test_a_vector_in_json_is_read_back_exactly(vector: np.ndarray, own_id: str | int | None) -> None:
    line = format_vector(Row(5, "line 6", b"", None, own_id), vector)
    read = json.loads(line)
    assert line.count("\n") == 1
    assert np.array(read.pop("vector"), dtype=np.float32).tobytes() == vector.tobytes()
    assert read == ({"index": 5} if own_id is None else {"id": own_id})


def test_rows_come_out_in_order_and_bad_ones_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embedder, resumed = run(tmp_path / "v.jsonl", TEXTS)
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    kept = [number for number, text in enumerate(TEXTS) if "bad" not in text]
    assert resumed == 0
    assert [line["index"] for line in lines] == kept
    assert [line["vector"][1] for line in lines] == [ord(TEXTS[number][-1]) for number in kept]
    assert [len(batch) for batch in embedder.batches] == [4, 4, 2, 4, 2]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "line 10 was passed over",
        "line 12 was passed over",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["v.jsonl"]


def test_the_rows_of_an_npy_file_are_the_kept_ones_and_a_file_beside_it_lists_the_others(tmp_path: Path) -> None:
    run(tmp_path / "v.npy", TEXTS)
    vectors = np.load(tmp_path / "v.npy")
    assert (vectors.dtype, vectors.shape) == (np.float32, (16, 3))
    assert vectors[:, 1].tolist() == [ord(text[-1]) for text in TEXTS if "bad" not in text]
    listed = [json.loads(line) for line in (tmp_path / "v.npy.skipped.jsonl").read_text().splitlines()]
    assert [(one["index"], one["label"]) for one in listed] == [(9, "line 10"), (11, "line 12")]
    run(tmp_path / "v.npy", TEXTS[:9])
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_a_bad_row_ends_the_run_and_the_mended_input_goes_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 10 cannot be embedded: it is bad"):
        run(tmp_path / "v.npy", TEXTS, skip_errors=False)
    assert not (tmp_path / "v.npy").exists()
    mended = [text.replace("bad", "good") for text in TEXTS]
    embedder, resumed = run(tmp_path / "v.npy", mended, skip_errors=False)
    assert (resumed, sum(map(len, embedder.batches))) == (8, len(TEXTS) - 8)
    run(tmp_path / "whole.npy", mended)
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("texts", [["bad"], ["bad", "good"], []])
def test_a_run_that_ends_before_its_first_batch_leaves_nothing(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(InputError):
        run(tmp_path / "v.npy", texts, skip_errors=False)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_which_none_can_be_embedded_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of 9 rows"):
        run(tmp_path / "v.npy", ["bad"] * 9)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_rows_fault_ends_the_run_whatever_is_to_be_skipped(tmp_path: Path) -> None:
    class WithoutProjector(FakeEmbedder):
        def embed_batch(self, items: Sequence[dict[str, str]], *, batch_size: int) -> np.ndarray:
            raise number_error(ModelFileError("no projector fits"), 0) from ModelFileError("no projector fits")

    rows = text_rows(TEXTS)
    with PartFile(tmp_path / "v.npy", OPTIONS) as part, pytest.raises(ModelFileError, match=r"^no projector fits$"):
        embed_rows(WithoutProjector(), rows, part, batch_size=4, skip_errors=True)  # type: ignore[arg-type]


def test_all_kinds_of_bad_rows_are_told_in_the_inputs_order(tmp_path: Path) -> None:
    lines = b'{"text": "bad"}\n{"text": "a", "image": "none.png"}\n{"text": "good"}\n{}\n'
    embedder = FakeEmbedder()
    with PartFile(tmp_path / "v.npy", OPTIONS) as part:
        embed_rows(embedder, read_rows(io.BytesIO(lines)), part, batch_size=4, skip_errors=True)  # type: ignore[arg-type]
    listed = [json.loads(line) for line in (tmp_path / "v.npy.skipped.jsonl").read_text().splitlines()]
    assert [one["label"] for one in listed] == ["line 1", "line 2", "line 4"]
    assert ["it is bad" in listed[0]["reason"], "none.png" in listed[1]["reason"]] == [True, True]
    assert embedder.batches == [["good"]]


def test_long_texts_and_pictures_make_small_batches(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    items = [{"text": "x" * 20_000}] * 5 + [{"text": "a", "image": str(tmp_path / "p.png")}] * 20
    lines = b"".join(json.dumps(item).encode() + b"\n" for item in items)
    embedder = FakeEmbedder()
    with PartFile(tmp_path / "v.npy", OPTIONS) as part:
        embed_rows(embedder, read_rows(io.BytesIO(lines)), part, batch_size=99, skip_errors=False)  # type: ignore[arg-type]
    assert [len(batch) for batch in embedder.batches] == [2, 2, 1 + 7, 13]


def snapshots(target: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """What the folder holds before and after each thing that is put on the disk during a run."""
    taken: list[dict[str, bytes]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        for work in (lambda _: None, fsync):
            work(descriptor)
            taken.append({path.name: path.read_bytes() for path in target.parent.iterdir()})

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", record)
        run(target, TEXTS)
    return taken


def torn(before: dict[str, bytes], after: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """The folder as a kill or a power cut may leave it between two snapshots: what grew is there in part."""
    yield after
    for name, data in after.items():
        if len(data) > (size := len(before.get(name, b""))) and not name.endswith(".tmp"):
            yield after | {name: data[: (size + len(data)) // 2]}
            yield after | {name: data[:-1]}
            yield after | {name: data + b"\x00garbage"}


@pytest.mark.parametrize("name", ["v.npy", "v.jsonl"])
def test_a_run_cut_off_at_any_instant_goes_on_to_the_same_bytes_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "whole").mkdir()
    taken = snapshots(tmp_path / "whole" / name, monkeypatch)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    resumed_at = set()
    states = [state for before, after in itertools.pairwise([{}, *taken]) for state in torn(before, after)]
    for number, state in enumerate(states):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, data in state.items():
            (folder / file).write_bytes(data)
        embedder, resumed = run(folder / name, TEXTS)
        left = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}
        assert left == whole
        assert sum(map(len, embedder.batches)) == sum("bad" not in text for text in TEXTS[resumed:])
        resumed_at.add(resumed)
    assert resumed_at == {0, 4, 8, 12, 16, 18}


def kill_at_the_end(target: Path) -> None:
    """A whole run, killed when its target is in place and its journal about to be removed."""
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_embed_run as runs
unlink = Path.unlink
def kill(path, **options):
    if path.name.endswith(".part.jsonl"):
        os.kill(os.getpid(), signal.SIGKILL)
    unlink(path, **options)
Path.unlink = kill
runs.run(Path({str(target)!r}), runs.TEXTS)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == -signal.SIGKILL
    assert target.exists()
    assert target.with_name(f"{target.name}.part.jsonl").exists()


@pytest.mark.parametrize("name", ["v.npy", "v.jsonl"])
def test_a_run_killed_when_only_its_journal_was_left_is_done(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    kill_at_the_end(target)
    whole = target.read_bytes()
    embedder, resumed = run(target, TEXTS)
    assert (resumed, embedder.batches, target.read_bytes()) == (len(TEXTS), [], whole)
    assert not list(tmp_path.glob("*.part*"))
    kill_at_the_end(target)
    with pytest.raises(InputError, match="have changed"):
        run(target, TEXTS[::-1])
    assert target.read_bytes() == whole
    embedder, resumed = run(target, [*TEXTS, "one more"])
    assert (resumed, embedder.batches) == (len(TEXTS), [["one more"]])
    kill_at_the_end(target)
    assert run(target, TEXTS, pooling="mean")[1] == 0
    kill_at_the_end(target)
    (other := tmp_path / "other").write_bytes(target.read_bytes())
    other.replace(target)
    assert run(target, TEXTS)[1] == 0


def begin(target: Path) -> None:
    """Leave a part of eight rows."""
    with pytest.raises(InputError):
        run(target, TEXTS, skip_errors=False)


@pytest.mark.parametrize(
    ("texts", "changed", "told"),
    [
        (TEXTS, {"pooling": "mean"}, "another pooling"),
        (TEXTS, {"layer": 0, "pooling": "max"}, "another pooling, layer"),
        (TEXTS, {"model": "abc"}, "another model"),
        (["changed", *TEXTS[1:]], {}, "its first 8 rows have changed"),
        (TEXTS[1:], {}, "its first 8 rows have changed"),
        (TEXTS[:7], {}, "more rows"),
    ],
)
def test_a_part_of_another_run_is_refused_kept_and_forgotten_on_request(
    tmp_path: Path, texts: list[str], changed: dict[str, Any], told: str
) -> None:
    target = tmp_path / "v.npy"
    begin(target)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=told) as refusal:
        run(target, texts, **changed)
    assert "v.npy.part was begun with" in str(refusal.value)
    assert "delete it, or give --restart" in str(refusal.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(target, texts, restart=True, **changed)[1] == 0
    assert not target.with_name("v.npy.part").exists()


def test_a_part_without_a_batch_is_nothing_to_insist_on(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "v.npy", OPTIONS)
    part.__enter__()
    part._journal.close()  # as a kill leaves it
    assert len(list(tmp_path.iterdir())) == 2
    assert run(tmp_path / "v.npy", TEXTS, pooling="mean")[1] == 0
    part._data.close()


def test_deleting_the_part_is_enough_to_begin_anew(tmp_path: Path) -> None:
    begin(tmp_path / "v.npy")
    (tmp_path / "v.npy.part").unlink()
    assert run(tmp_path / "v.npy", TEXTS, pooling="mean")[1] == 0


def test_a_part_that_lost_bytes_or_its_journal_is_refused(tmp_path: Path) -> None:
    target, part = tmp_path / "v.npy", tmp_path / "v.npy.part"
    begin(target)
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="more in it"):
        run(target, TEXTS)
    part.write_bytes(whole)
    (tmp_path / "v.npy.part.jsonl").unlink()
    with pytest.raises(InputError, match="nothing says what it holds"):
        run(target, TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy.part"]


def test_two_runs_into_one_file_at_once_are_refused(tmp_path: Path) -> None:
    with PartFile(tmp_path / "v.npy", OPTIONS), pytest.raises(InputError, match="in use"):
        run(tmp_path / "v.npy", TEXTS)


def test_a_full_disk_is_an_input_error_and_the_run_goes_on_later(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = run_whole(tmp_path / "whole.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) * 2 // 3, limits[1]))
    try:
        with pytest.raises(InputError, match=r"v.jsonl' cannot be written: File too large"):
            run(tmp_path / "v.jsonl", TEXTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(tmp_path / "v.jsonl", TEXTS)[1] > 0
    assert (tmp_path / "v.jsonl").read_bytes() == whole


def run_whole(target: Path) -> bytes:
    run(target, TEXTS)
    return target.read_bytes()


@pytest.mark.parametrize("name", ["v.bin", "v", "there.npy", "nowhere/v.npy"])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "there.npy").mkdir()
    with pytest.raises(InputError):
        check_output(tmp_path / name)


def test_an_input_that_cannot_be_read_or_is_the_output_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(path)
    assert Source((), (), str(path)).check(tmp_path / "out.jsonl", skip_errors=False) == 1
    for source, output in (
        (Source((), (), str(path)), tmp_path / "link.jsonl"),
        (Source((), (), str(tmp_path)), None),
        (Source((), (), str(tmp_path / "none.jsonl")), None),
        (Source((), (), "a\0b"), None),
        (Source(("a",), (), str(path)), None),
        (Source(("-",), (), None), None),
        (Source((), (), None), None),
    ):
        with pytest.raises(InputError):
            source.check(output, skip_errors=False)


def write_items(path: Path, n_items: int) -> None:
    """Texts of all lengths, the photo now and then, and a bad row."""
    chance = random.Random(5)
    with path.open("w") as file:
        for number in range(n_items):
            item: dict[str, Any] = {"id": f"id {number}", "text": "word " * chance.randint(1, 30)}
            if number % 17 == 3:
                item["image"] = str(path.with_name("photo.png"))
            file.write(json.dumps({"text": ""} if number == 11 else item) + "\n")


def check_kills(folder: Path, model: Path, suffix: str, *, n_items: int, n_kills: int, seed: int) -> None:
    """Kill a run at random instants, and compare the file that is made in the end with an uninterrupted run's."""
    pixels = np.random.default_rng(7).integers(0, 255, (70, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    write_items(folder / "items.jsonl", n_items)
    chance = random.Random(seed)
    command = [sys.executable, "-m", "lookonce", "embed", "--input", str(folder / "items.jsonl"), "--skip-errors"]
    command += ["--model", str(model), "--store", str(folder / "store"), "--threads", "1", "--batch-size", "2"]
    whole, target = folder / f"whole.{suffix}", folder / f"killed.{suffix}"
    subprocess.run([*command, "-o", whole], check=True, capture_output=True, timeout=300)
    for _ in range(n_kills):
        kill(subprocess.Popen([*command, "-o", str(target)], stdout=-1, stderr=-1), target, chance)
        assert not target.exists(), "the run ended before it was killed: give it more items"
    end = subprocess.run([*command, "-o", target], check=True, capture_output=True, text=True, timeout=300)
    assert "rows done before, 1 row passed over" in end.stdout
    assert target.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("*.part*"))
    if suffix == "npy":
        assert np.load(target).shape[0] == n_items - 1
        listed = [path.with_name(f"{path.name}.skipped.jsonl").read_bytes() for path in (whole, target)]
        assert listed[0] == listed[1]


def kill(process: "subprocess.Popen[bytes]", target: Path, chance: random.Random) -> None:
    """Kill a run: a little after it has done some batches, or wherever it is by then."""
    journal = target.with_name(f"{target.name}.part.jsonl")
    size, batches = size_of(journal), chance.choice([0, 1, 1, 2, 3])
    while batches and process.poll() is None:
        batches -= size_of(journal) > size
        size = size_of(journal)
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03 if size else 1.5))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_run_killed_five_times_gives_the_bytes_of_one_left_alone(
    tmp_path: Path, tiny_pair: tuple[Path, Path]
) -> None:
    check_kills(tmp_path, tiny_pair[0], "npy", n_items=80, n_kills=5, seed=3)
