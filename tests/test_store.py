"""The store: what is put is got, the limit holds, and no fault of the disk shows as anything but a miss."""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import sqlite3
import statistics
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lookonce import store as store_module
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


def test_the_folder_and_the_limit_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "named"))
    monkeypatch.setenv("LOOKONCE_STORE_LIMIT", "1000")
    with Store() as store:
        assert (store.folder, store.limit_bytes) == (tmp_path / "named", 1000)
    with Store(tmp_path / "given", limit_bytes=5) as store:
        assert (store.folder, store.limit_bytes) == (tmp_path / "given", 5)
    monkeypatch.setenv("LOOKONCE_STORE_LIMIT", "20 GB")
    with pytest.raises(InputError, match="'20 GB'"):
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


def test_notes_are_remembered_until_newer_ones_push_them_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_check_names_what_is_amiss_and_repairs_it_when_asked(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert not (report.corrupt or report.missing or report.orphans or report.temporaries)
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
        assert keys(again) == [D, A, C, B] if not damage else keys(again) == [D, C, B, A]
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
    monkeypatch.setattr(store_module.Store._write, "__kwdefaults__", {"timeout_s": 0.05})
    with contextlib.closing(sqlite3.connect(store.folder / "index.sqlite")) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert not store.put(B, "look", b"rows")
        store.remember("picture", "a", "b")
        writer.execute("ROLLBACK")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert store.get(B, "look") is None
    assert list((store.folder / "tmp").iterdir()) == []
    assert store.put(B, "look", b"rows")


@pytest.mark.parametrize("step", ["fsync", "replace", "commit"])
def test_a_full_disk_at_any_step_is_a_warning_and_leaves_nothing(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store.put(A, "look", b"rows")

    def full(*_: object, **__: object) -> None:
        if step == "commit":
            raise sqlite3.OperationalError("database or disk is full")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        owner, name = {
            "fsync": (os, "fsync"),
            "replace": (Path, "replace"),
            "commit": (store_module.store_index, "put_row"),
        }[step]
        if step == "commit":
            patch.setattr("lookonce.store.store_index.put_row", lambda *_: full_in_transaction())

            def full_in_transaction() -> None:
                raise store_module.IndexUnavailable("database or disk is full")
        else:
            patch.setattr(owner, name, full)
        assert not store.put(B, "look", b"rows")
        assert not store.put(A, "look", b"rows")
        store.remember("picture", "a", "b")
        assert store.get(A, "look") == b"rows"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert not entry_path(store, B).exists()
    assert list((store.folder / "tmp").iterdir()) == []
    assert store.put(B, "look", b"rows")
    assert store.get(A, "look") == store.get(B, "look") == b"rows"
    report = store.check()
    assert (report.corrupt, report.missing, report.orphans) == ((), (), ())
