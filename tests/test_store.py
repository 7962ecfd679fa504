"""The store: what is put is got, the limit holds, and no fault of the disk shows as anything but a miss."""

import contextlib
import errno
import hashlib
import os
import signal
import sqlite3
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lookonce import store_index
from lookonce.entry_file import HEADER_BYTES, EntryName
from lookonce.errors import ClosedError, InputError, StoreError
from lookonce.store import Store

sys.path.insert(0, str(Path(__file__).parent / "stress"))
import test_store_stress as stress


def make_key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


A, B, C, D = map(make_key, range(4))


def keys(store: Store) -> list[str]:
    return [entry.key for entry in store.entries()]


def entry_path(store: Store, key: str, kind: str = "look") -> Path:
    return EntryName(key, kind).path(store.folder / "objects")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


def test_what_is_put_is_got_by_another_store_too(store: Store) -> None:
    assert store.put(A, "look", b"rows", label="cat.jpg")
    assert store.put(A, "state", memoryview(bytearray(b"cache")))
    assert store.put(B, "look", b"")
    with Store(store.folder) as other:
        for one in (store, other):
            assert one.get(A, "look") == b"rows"
            assert one.get(A, "state") == b"cache"
            assert one.get(B, "look") == b""
            assert one.get(B, "state") is None
            assert one.get(C, "look") is None


def test_a_second_put_replaces_the_first(store: Store) -> None:
    store.put(A, "look", b"one")
    store.put(A, "look", b"other")
    assert store.get(A, "look") == b"other"
    assert store.stats().size_bytes == HEADER_BYTES + 5


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    with Store(tmp_path / "a" / "b") as store:
        assert store.get(A, "look") is None
        assert store.recall("picture", "x") is None
        assert list(store.entries()) == []
        assert store.stats().entries == store.prune() == store.clear() == store.check().checked == 0
        assert list(tmp_path.iterdir()) == []
        assert store.put(A, "look", b"rows")


def test_the_folder_and_the_limit_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "named"))
    monkeypatch.setenv("LOOKONCE_STORE_LIMIT", "1000")
    with Store() as store:
        assert (store.folder, store.limit_bytes) == (tmp_path / "named", 1000)
    with Store(tmp_path / "given", limit_bytes=5) as store:
        assert (store.folder, store.limit_bytes) == (tmp_path / "given", 5)
    monkeypatch.setenv("LOOKONCE_STORE_LIMIT", "2 GB")
    with Store() as store:
        assert store.limit_bytes == 2_000_000_000
    monkeypatch.setenv("LOOKONCE_STORE_LIMIT", "much")
    with pytest.raises(InputError, match="LOOKONCE_STORE_LIMIT: 'much' is not a size"):
        Store()
    monkeypatch.delenv("LOOKONCE_STORE")
    monkeypatch.delenv("LOOKONCE_STORE_LIMIT")
    with Store() as store:
        assert store.limit_bytes == 20 << 30
        assert "lookonce" in store.folder.parts


def test_names_that_could_leave_the_folder_are_refused(store: Store) -> None:
    for key, kind in ((A.upper(), "look"), (A[1:], "look"), ("../" + A, "look"), (A, "../x"), (A, "")):
        with pytest.raises(InputError):
            store.put(key, kind, b"rows")
        with pytest.raises(InputError):
            store.get(key, kind)


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        *[((key, "look"), b"rows") for key in (None, 5, A.encode(), [A])],
        *[((A, kind), b"rows") for kind in (None, 5, b"look")],
        *[((A, "look"), payload) for payload in (None, "rows", [1], np.zeros((4, 4)).T[::2])],
    ],
)
def test_wrong_types_are_refused(store: Store, name: tuple[Any, Any], payload: Any) -> None:
    with pytest.raises(InputError):
        store.put(*name, payload)
    if name != (A, "look"):
        with pytest.raises(InputError):
            store.get(*name)
    assert keys(store) == []


@pytest.mark.parametrize(("folder", "kind"), [(5, InputError), ("x" * 5000, StoreError), ("a\0b", StoreError)])
def test_what_can_be_no_folder_is_refused(folder: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="folder"):
        Store(folder)


def test_a_label_that_is_no_utf8_is_kept_as_far_as_it_can_be(store: Store) -> None:
    assert store.put(A, "look", b"rows", label="caf\udce9.png")
    assert [entry.label for entry in store.entries()] == ["caf?.png"]
    assert store.get(A, "look") == b"rows"


def test_an_entry_of_another_version_is_told_apart_from_damage(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.put(A, "look", b"rows")
    data = bytearray(entry_path(store, A).read_bytes())
    data[:8] = b"LOOKSTO2"
    data[224:256] = hashlib.sha256(data[:224]).digest()
    entry_path(store, A).write_bytes(data)
    assert store.get(A, "look") is None
    assert "it is of another version" in caplog.text
    report = store.check()
    assert (report.outdated, report.corrupt, report.sound) == ((f"{A}.look",), (), True)
    assert store.check(repair=True).outdated == (f"{A}.look",)
    assert keys(store) == []


def test_damage_is_told_once_until_the_entry_is_made_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        store.put(A, "look", b"rows")
        entry_path(store, A).write_bytes(b"damaged")
        caplog.clear()
        for _ in range(3):
            assert store.get(A, "look") is None
        assert len(caplog.records) == 1


@pytest.mark.parametrize("shrink", [Store.clear, lambda store: store.prune(300_000)], ids=["clear", "prune"])
def test_a_disk_without_room_for_the_index_is_given_some(tmp_path: Path, shrink: Callable[[Store], int]) -> None:
    place = tmp_path / "small"
    place.mkdir()
    with stress.mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)):
        with Store(place / "store") as store:
            for number in range(8):
                store.put(make_key(number), "look", bytes(100_000))
        for path in (place / "store").glob("index.sqlite-*"):
            path.unlink()
        free = os.statvfs(place)
        (place / "other").write_bytes(bytes(free.f_bavail * free.f_frsize))
        with Store(place / "store") as store:
            assert shrink(store) >= 500_000
            assert store.stats().size_bytes <= 300_000
            assert store.check().sound


def test_a_closed_store_says_so(store: Store) -> None:
    store.put(A, "look", b"rows")
    store.close()
    store.close()
    for use in (lambda: store.get(A, "look"), lambda: store.put(A, "look", b""), store.stats, store.check):
        with pytest.raises(ClosedError, match=r"after close\(\)"):
            use()
    for use in (lambda: store.recall("a", "b"), lambda: store.remember("a", "b", "c")):
        with pytest.raises(ClosedError):
            use()


def test_a_file_in_the_folders_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreError, match="is not a folder"):
        Store(tmp_path / "store")


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    size = HEADER_BYTES + 100
    with Store(tmp_path, limit_bytes=3 * size) as store:
        for key in (A, B, C):
            store.put(key, "look", bytes(100))
        store.get(A, "look")
        store.put(D, "state", bytes(100))
        assert keys(store) == [D, A, C]
        assert store.get(B, "look") is None
        assert not entry_path(store, B).exists()
        store.put(B, "look", bytes(100 + size))
        assert keys(store) == [B, D]
        assert store.stats().size_bytes == 3 * size


def test_the_order_of_use_holds_across_processes(tmp_path: Path) -> None:
    with Store(tmp_path) as one, Store(tmp_path) as other:
        for key in (A, B, C, D):
            one.put(key, "look", b"rows")
        other.get(B, "look")
        one.get(A, "look")
        other.get(C, "look")
        assert keys(one) == keys(other) == [C, A, B, D]


def test_a_payload_over_the_limit_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(tmp_path / "store", limit_bytes=HEADER_BYTES + 10) as store:
        assert store.put(A, "look", bytes(10))
        assert not store.put(B, "look", bytes(11))
        assert keys(store) == [A]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "more than the limit" in caplog.text


def test_a_lower_limit_holds_at_the_next_put(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for number in range(20):
            store.put(make_key(number), "look", bytes(100))
    with Store(tmp_path, limit_bytes=4 * (HEADER_BYTES + 100)) as store:
        store.put(make_key(20), "look", bytes(100))
        assert keys(store) == [make_key(number) for number in (20, 19, 18, 17)]


def test_stats_count_by_kind(store: Store) -> None:
    store.put(A, "look", bytes(10), label="é" * 100)
    store.put(B, "look", bytes(20))
    store.put(B, "state", bytes(30))
    stats = store.stats()
    assert (stats.folder, stats.limit_bytes, stats.entries) == (store.folder, 20 << 30, 3)
    assert {kind: (s.entries, s.size_bytes - s.entries * HEADER_BYTES) for kind, s in stats.kinds.items()} == {
        "look": (2, 30),
        "state": (1, 30),
    }
    assert stats.size_bytes == sum(path.stat().st_size for path in store.folder.glob("objects/*/*/*"))
    entry = list(store.entries())[-1]
    assert (entry.key, entry.kind, entry.size_bytes) == (A, "look", HEADER_BYTES + 10)
    assert abs(entry.created_s - time.time()) < 60


def test_prune_and_clear_free_what_they_say(store: Store) -> None:
    for number in range(10):
        store.put(make_key(number), "look", bytes(100))
    store.remember("picture", "a", "b")
    size = HEADER_BYTES + 100
    assert store.prune(4 * size) == 6 * size
    assert keys(store) == [make_key(number) for number in (9, 8, 7, 6)]
    assert store.prune() == 0
    assert store.clear() == 4 * size
    assert list(store.folder.glob("objects/*/*/*")) == []
    assert store.recall("picture", "a") is None
    assert store.stats().entries == 0


def test_notes_are_remembered_until_newer_ones_push_them_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookonce.store_index._MAX_NOTES", 3)
    for number in range(4):
        store.remember("picture", str(number), f"key {number}")
    store.remember("picture", "1", "changed")
    store.remember("file", "1", "another kind")
    with Store(store.folder) as other:
        told = [other.recall("picture", str(number)) for number in range(4)]
    assert told == [None, "changed", None, "key 3"]
    assert store.recall("file", "1") == "another kind"


def test_a_note_that_was_changed_is_a_logged_miss(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.remember("picture", "a", "key 1")
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite")) as connection, connection:
        connection.execute("UPDATE notes SET value='key 2'")
    assert store.recall("picture", "a") is None
    assert "counts as missing" in caplog.text
    store.remember("picture", "a", "key 1")
    assert store.recall("picture", "a") == "key 1"


@pytest.mark.parametrize("place", [0, 9, 30, 60, 70, 100, 230, HEADER_BYTES, HEADER_BYTES + 50, -1])
def test_a_changed_byte_in_an_entry_is_a_logged_miss_until_it_is_put_again(
    store: Store, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    store.put(A, "look", bytes(100))
    path = entry_path(store, A)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    assert store.get(A, "look") is None
    assert "counts as missing" in caplog.text
    assert path.read_bytes() == data, "a reader deletes nothing"
    assert store.check().corrupt == (f"{A}.look",)
    assert store.put(A, "look", bytes(100))
    assert store.get(A, "look") == bytes(100)
    assert store.check().sound


@pytest.mark.parametrize("size_bytes", [0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (5 << 18) + 3])
def test_an_entry_of_any_size_is_given_whole_and_cannot_be_written_to(store: Store, size_bytes: int) -> None:
    payload = np.random.default_rng(0).bytes(size_bytes)
    store.put(A, "state", payload)
    kept = store.get(A, "state")
    assert kept is not None
    assert kept == payload
    assert kept.readonly


@pytest.mark.parametrize("place", [0, (1 << 18) - 1, 1 << 18, 5 << 18, -1])
def test_a_large_entry_is_verified_to_its_last_piece(store: Store, place: int) -> None:
    payload = bytearray(np.random.default_rng(0).bytes((5 << 18) + 3))
    store.put(A, "state", bytes(payload))
    payload[place] ^= 1
    entry_path(store, A, "state").write_bytes(entry_path(store, A, "state").read_bytes()[:HEADER_BYTES] + payload)
    assert store.get(A, "state") is None


@pytest.mark.parametrize("reason", [errno.ENOMEM, errno.EMFILE, errno.EACCES])
def test_a_repair_deletes_nothing_that_only_could_not_be_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def fail(*_: object) -> memoryview:
        raise OSError(reason, os.strerror(reason))

    store.put(A, "look", b"rows")
    with monkeypatch.context() as patch:
        patch.setattr("lookonce.entry_folder.read_payload", fail)
        with pytest.raises(StoreError, match=os.strerror(reason)):
            store.check(repair=True)
    assert store.get(A, "look") == b"rows"
    with monkeypatch.context() as patch:
        reason = errno.EIO
        patch.setattr("lookonce.entry_folder.read_payload", fail)
        assert store.check(repair=True).corrupt == (f"{A}.look",)
    assert store.get(A, "look") is None


@pytest.mark.parametrize("length", [0, 10, HEADER_BYTES, HEADER_BYTES + 99, HEADER_BYTES + 101])
def test_an_entry_of_a_wrong_length_is_a_miss(store: Store, length: int) -> None:
    store.put(A, "look", bytes(100))
    os.truncate(entry_path(store, A), length)
    assert store.get(A, "look") is None


def test_an_entry_under_another_name_is_a_miss(store: Store) -> None:
    store.put(A, "look", b"rows of A")
    store.put(B, "look", b"rows of B")
    entry_path(store, B).write_bytes(entry_path(store, A).read_bytes())
    entry_path(store, A).rename(entry_path(store, A, "state"))
    assert store.get(B, "look") is store.get(A, "state") is None


def test_check_names_what_is_amiss_and_repairs_it_when_asked(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for key in (A, B, C, D):
        store.put(key, "look", bytes(100), label="cat.jpg")
    assert store.check().sound
    entry_path(store, A).write_bytes(b"damaged")
    entry_path(store, B).unlink()
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite")) as connection, connection:
        connection.execute("DELETE FROM entries WHERE key=?", (C,))
    for name, age_s in ((".1-a.tmp", 4000), (".1-b.tmp", 10)):
        path = store.folder / "tmp" / name
        path.write_bytes(b"part")
        os.utime(path, (time.time() - age_s,) * 2)
    (store.folder / "objects" / "note.txt").write_text("not the store's")
    for repair in (False, True):
        report = store.check(repair=repair)
        assert (report.checked, report.index_damaged, report.repaired) == (3, False, repair)
        assert (report.corrupt, report.missing) == ((f"{A}.look",), (f"{B}.look",))
        assert (report.orphans, report.temporaries) == ((f"{C}.look",), (".1-a.tmp",))
        assert not report.sound
    report = store.check()
    assert report.sound
    assert (report.corrupt, report.missing, report.orphans, report.temporaries) == ((), (), (), ())
    assert keys(store) == [C, D]
    assert {entry.label for entry in store.entries()} == {"cat.jpg"}
    assert [path.name for path in (store.folder / "tmp").iterdir()] == [".1-b.tmp"]
    assert (store.folder / "objects" / "note.txt").exists()


def test_an_entry_without_a_row_is_found_and_adopted(store: Store) -> None:
    store.put(A, "look", b"rows", label="cat.jpg")
    store.put(B, "look", b"rows")
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite")) as connection, connection:
        connection.execute("DELETE FROM entries WHERE key=?", (A,))
    assert keys(store) == [B]
    assert store.get(A, "look") == b"rows"
    assert [(entry.key, entry.label) for entry in store.entries()] == [(A, "cat.jpg"), (B, "")]


def test_old_temporaries_go_at_the_first_put(store: Store) -> None:
    old = store.folder / "tmp" / ".1-a.tmp"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"part")
    os.utime(old, (time.time() - 4000,) * 2)
    store.put(A, "look", b"rows")
    assert list(old.parent.iterdir()) == []


@pytest.mark.parametrize("damage", [b"garbage" * 1000, b"SQLite format 3\0" + bytes(5000), b"", None])
def test_a_damaged_index_is_set_aside_and_made_again(
    store: Store, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    for key in (A, B, C):
        store.put(key, "look", b"rows", label="cat.jpg")
        os.utime(entry_path(store, key), (len(keys(store)),) * 2)
    store.close()
    index = store.folder / "index.sqlite"
    index.unlink() if damage is None else index.write_bytes(damage)
    with Store(store.folder) as again:
        assert again.get(A, "look") == b"rows"
        assert again.put(D, "look", b"rows")
        assert keys(again) == [D, A, C, B]
        assert {entry.label for entry in again.entries()} == {"cat.jpg", ""}
        assert again.check().sound
    set_aside = list(store.folder.glob("*.corrupt-*"))
    assert len(set_aside) == bool(damage)
    assert ("set aside" in caplog.text) == bool(damage)


def test_a_wrong_total_in_the_index_evicts_nothing(tmp_path: Path) -> None:
    with Store(tmp_path, limit_bytes=100_000) as store:
        for number in range(10):
            store.put(make_key(number), "look", bytes(100))
    for total, size in ((1 << 60, 356), (-1, 356), (3560, 1 << 50)):
        with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
            connection.execute("UPDATE total SET size_bytes=?", (total,))
            connection.execute("UPDATE entries SET size_bytes=? WHERE key=?", (size, A))
        with Store(tmp_path, limit_bytes=100_000) as store:
            assert store.put(make_key(10), "look", bytes(100))
            assert store.stats().entries == 11


def test_a_total_that_is_too_low_does_not_outlive_the_process(tmp_path: Path) -> None:
    limit_bytes = 10 * (HEADER_BYTES + 100)
    with Store(tmp_path, limit_bytes=limit_bytes) as store:
        for number in range(10):
            store.put(make_key(number), "look", bytes(100))
    with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        connection.execute("UPDATE total SET size_bytes=0")
    with Store(tmp_path, limit_bytes=limit_bytes) as store:
        assert store.put(make_key(10), "look", bytes(100))
        assert store.stats().size_bytes == limit_bytes


def test_an_index_of_a_newer_lookonce_is_left_alone(store: Store) -> None:
    store.put(A, "look", b"rows")
    store.close()
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version={0x02020202}")
    with Store(store.folder) as again:
        for use in (again.stats, lambda: again.put(B, "look", b"rows"), lambda: again.get(A, "look")):
            with pytest.raises(StoreError, match="schema 2 and this lookonce knows 1: update lookonce"):
                use()


def test_a_store_whose_folder_vanishes_starts_again(store: Store) -> None:
    store.put(A, "look", b"rows")
    assert keys(store) == [A]
    store.folder.rename(store.folder.with_name("gone"))
    assert store.get(A, "look") is None
    assert store.put(B, "look", b"rows")
    assert keys(store) == [B]


def test_reading_waits_for_no_writer(store: Store) -> None:
    store.put(A, "look", b"rows")
    store.put(B, "look", b"rows")
    store.remember("picture", "a", "b")
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite")) as writer:
        writer.execute("BEGIN IMMEDIATE")
        start = time.perf_counter()
        for _ in range(20):
            assert store.get(A, "look") == b"rows"
            assert store.recall("picture", "a") == "b"
            assert len(keys(store)) == 2
        assert time.perf_counter() - start < 0.5
        writer.execute("ROLLBACK")
    store.put(C, "look", b"rows")
    assert keys(store) == [C, A, B], "the read is recorded by the next write"


def test_a_writer_that_cannot_have_its_turn_gives_up_with_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(A, "look", b"rows")
    monkeypatch.setattr(Store._write, "__kwdefaults__", {"timeout_s": 0.05})
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite")) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert not store.put(B, "look", b"rows")
        store.remember("picture", "a", "b")
        writer.execute("ROLLBACK")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert store.get(B, "look") is None
    assert list((store.folder / "tmp").iterdir()) == []
    assert store.put(B, "look", b"rows")


@pytest.mark.parametrize("step", ["fsync", "replace", "row", "second row"])
def test_a_full_disk_at_any_step_is_a_warning_and_leaves_nothing(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store.put(A, "look", b"rows")

    owner, name, error = {
        "fsync": (os, "fsync", OSError(28, "No space left on device")),
        "replace": (Path, "replace", OSError(28, "No space left on device")),
        "row": (store_index, "put_row", sqlite3.OperationalError("database or disk is full")),
        "second row": (store_index, "put_row", sqlite3.OperationalError("database or disk is full")),
    }[step]

    sound = getattr(owner, name)
    spared = [B] if step == "second row" else []

    def full(*arguments: Any, **options: Any) -> Any:
        if spared and arguments[1].key == spared.pop():
            return sound(*arguments, **options)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert not store.put(B, "look", b"rows")
        assert not store.put(A, "look", b"rows")
        store.remember("picture", "a", "b")
        assert store.get(A, "look") == b"rows"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert keys(store) == [A]
    assert not entry_path(store, B).exists()
    assert list((store.folder / "tmp").iterdir()) == []
    assert store.put(B, "look", b"rows")
    assert store.get(A, "look") == store.get(B, "look") == b"rows"
    report = store.check()
    assert (report.corrupt, report.missing, report.orphans) == ((), (), ())


def test_a_file_size_limit_is_a_warning_too(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    store.put(A, "look", b"rows")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert not store.put(B, "look", bytes(20_000))
        assert store.get(A, "look") == b"rows"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.levelname for record in caplog.records if "not kept" in record.message] == ["WARNING"]
    assert list((store.folder / "tmp").iterdir()) == []
    assert store.put(B, "look", bytes(20_000))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, for root too where it may mount."""
    if os.geteuid() == 0:
        bind = stress.mount("--bind", str(folder), str(folder))
        with bind:
            stress.run_mount("-o", "remount,ro,bind", str(folder))
            yield
        return
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path in reversed(paths):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def test_a_read_only_folder_is_read_and_nothing_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "store"
    with Store(folder) as store:
        store.put(A, "look", b"rows", label="cat.jpg")
        store.put(B, "look", b"rows")
        store.remember("picture", "a", "b")
    with read_only(folder), Store(folder) as store:
        for _ in range(2):
            assert store.get(A, "look") == b"rows"
            assert store.recall("picture", "a") == "b"
            assert store.recall("picture", "c") is None
            assert keys(store) == [B, A]
        assert caplog.records == []
        assert not store.put(C, "look", b"rows")
        store.remember("picture", "c", "d")
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert store.check().sound
        for use in (store.prune, store.clear, lambda: store.check(repair=True)):
            with pytest.raises(StoreError, match="cannot be changed"):
                use()
    (folder / "index.sqlite").unlink()
    with read_only(folder), Store(folder) as store:
        assert store.get(A, "look") == b"rows"
        assert sorted(keys(store)) == sorted([A, B])
        assert store.stats().size_bytes == 2 * (HEADER_BYTES + 4)


def test_a_folder_that_cannot_be_made_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with Store("/proc/lookonce") as store:
        assert not store.put(A, "look", b"rows")
        assert store.get(A, "look") is None
        store.remember("a", "b", "c")
        assert store.recall("a", "b") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_threads_share_one_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures: list[str] = []

    def work(store: Store, seed: int) -> None:
        for number in range(40):
            key = make_key((seed + number) % 20)
            if not store.put(key, "look", key.encode() * 50):
                failures.append("put")
            if store.get(make_key(number % 20), "look") not in (None, make_key(number % 20).encode() * 50):
                failures.append("get")
            store.remember("picture", key, key)
            if store.recall("picture", key) != key:
                failures.append("recall")

    with Store(tmp_path, limit_bytes=15 * (HEADER_BYTES + 3200)) as store:
        threads = [threading.Thread(target=work, args=(store, 7 * seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.check().sound
        assert store.stats().entries == 15
    assert caplog.records == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_store_goes_on_in_parent_and_child_after_a_fork(store: Store) -> None:
    store.put(A, "look", b"rows")
    store.remember("picture", "a", "b")
    parents = store._writing._connection
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store._writing._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        good = store.get(A, "look") == b"rows" and store.put(B, "look", b"child")
        good = good and store.recall("picture", "a") == "b" and keys(store) == [B, A]
        os._exit(0 if good and store._writing._connection is not parents else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert store.put(C, "look", b"parent")
    assert keys(store) == [C, B, A]
    assert store.check().sound


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_after_the_rename_leaves_no_file_uncounted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(A, "look", b"rows")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr("lookonce.entry_folder.sync_folder", lambda _: os._exit(9))
        store.put(B, "look", b"rows")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert entry_path(store, B).exists()
    assert keys(store) == [B, A]
    assert store.get(B, "look") == b"rows"
    assert store.check().orphans == ()


LIMIT = 5 * (HEADER_BYTES + 40)


class StoreMachine(RuleBasedStateMachine):
    """The store against a plain ordered dict, over two connections to one folder."""

    @initialize(folder=st.just(None))
    def start(self, folder: None) -> None:
        import tempfile

        self.temporary = tempfile.TemporaryDirectory()
        self.stores = [Store(self.temporary.name, limit_bytes=LIMIT) for _ in range(2)]
        self.model: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def evict(self, limit: int) -> None:
        while sum(HEADER_BYTES + len(payload) for payload in self.model.values()) > limit:
            self.model.popitem(last=False)

    names = st.tuples(st.sampled_from([A, B, C, D]), st.sampled_from(["look", "state"]))
    which = st.integers(0, 1)

    @rule(which=which, name=names, payload=st.binary(max_size=80))
    def put(self, which: int, name: tuple[str, str], payload: bytes) -> None:
        assert self.stores[which].put(*name, payload)
        self.model.pop(name, None)
        self.model[name] = payload
        self.evict(LIMIT)

    @rule(which=which, name=names)
    def get(self, which: int, name: tuple[str, str]) -> None:
        assert self.stores[which].get(*name) == self.model.get(name)
        if name in self.model:
            self.model.move_to_end(name)

    @rule(which=which, limit=st.integers(0, LIMIT))
    def prune(self, which: int, limit: int) -> None:
        self.stores[which].prune(limit)
        self.evict(limit)

    @rule(which=which)
    def reopen(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = Store(self.temporary.name, limit_bytes=LIMIT)

    @rule(which=which, repair=st.booleans())
    def check(self, which: int, repair: bool) -> None:
        report = self.stores[which].check(repair=repair)
        assert report.checked == len(self.model)
        assert report.sound
        assert (report.missing, report.orphans) == ((), ())

    @invariant()
    def same_order(self) -> None:
        for store in getattr(self, "stores", []):
            names = [(entry.key, entry.kind) for entry in store.entries()]
            assert names == list(reversed(self.model))

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.temporary.cleanup()


TestStoreAgainstADict = StoreMachine.TestCase
TestStoreAgainstADict.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_kills_lose_nothing_and_damage_nothing(tmp_path: Path) -> None:
    stress.kill_writers(tmp_path, kills=6, seed=1)


def test_many_processes_share_one_store(tmp_path: Path) -> None:
    stress.share_store(tmp_path, processes=8, seconds=3.0)


def test_flipped_bits_and_truncations_are_misses_and_never_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stress.damage_store(tmp_path, monkeypatch, times=15, seed=1)


def test_a_full_disk_is_a_warning_and_reads_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stress.fill_disk(tmp_path, caplog)


def test_lookups_stay_quick_in_a_large_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stress.time_lookups(tmp_path, monkeypatch, entries=1000)
