"""The store under kills, crowds, damage and a full disk.

Each run is a function that the default tests call with small numbers. The long runs log their figures
(`--log-cli-level=INFO`).
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lookonce.entry_file import HEADER_BYTES
from lookonce.store import Store

KINDS = ("look", "state")

_logger = logging.getLogger(__name__)


def make_key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def make_payload(key: str, kind: str) -> bytes:
    """Give the one right payload of an entry, up to 160 kB."""
    chance = random.Random(key + kind)
    return chance.randbytes(chance.choice([0, 100, 5_000, 40_000, 160_000]))


def start_worker(*arguments: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-W", "error", __file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_for_ever(folder: str, limit_bytes: str, seed: str) -> None:
    """Print each key once its put has returned True."""
    chance = random.Random(seed)
    with Store(folder, limit_bytes=int(limit_bytes)) as store:
        say("ready")
        while True:
            number = chance.randrange(1 << 40)
            key = make_key(number)
            kind = chance.choice(KINDS)
            payload = make_payload(key, kind)
            parts = (payload[:50], memoryview(payload)[50:]) if kind == "state" else payload
            if store.put(key, kind, parts, label=str(number)):
                say(f"{key} {kind}")
            store.remember("picture", key, kind)
            store.get(make_key(chance.randrange(100)), kind)


def kill_writers(folder: Path, *, kills: int, seed: int) -> None:
    """Kill writers at random instants, half of them in a store that evicts."""
    chance = random.Random(seed)
    limits = {folder / "roomy": 1 << 40, folder / "narrow": 1_000_000}
    committed: dict[Path, list[tuple[str, str]]] = {place: [] for place in limits}
    for number in range(kills):
        place = list(limits)[number % 2]
        writer = start_worker("write", str(place), str(limits[place]), f"{seed}/{number}")
        assert writer.stdout is not None
        if chance.random() < 0.8:
            assert writer.stdout.readline() == "ready\n", writer.communicate()
        time.sleep(chance.uniform(0, 0.25))
        writer.send_signal(signal.SIGKILL)
        output, errors = writer.communicate()
        assert (writer.returncode, errors) == (-signal.SIGKILL, "")
        # A last line without its end was cut by the kill.
        lines = [line.split() for line in output.split("\n")[:-1] if line != "ready"]
        committed[place] += [(key, kind) for key, kind in lines]
    left = Counter[str]()
    for place, limit_bytes in limits.items():
        with Store(place, limit_bytes=limit_bytes) as store:
            kept = set()
            for key, kind in committed[place]:
                payload = store.get(key, kind)
                if payload is not None:
                    kept.add((key, kind))
                    assert payload == make_payload(key, kind)
            report = store.check()
            assert report.sound, report
            assert report.orphans == (), "the limit does not count a file"
            left["rows without a file"] += len(report.missing)
            left["temporaries"] += len(list((place / "tmp").iterdir()))
            if place.name == "roomy":
                assert kept == set(committed[place]), "a committed entry is lost"
            else:
                assert committed[place][-1] in kept
                assert store.put(make_key(-1), "look", b"rows")
                on_disk = sum(path.stat().st_size for path in place.glob("objects/*/*/*"))
                assert on_disk <= limit_bytes
    writes = sum(map(len, committed.values()))
    _logger.info(f"{kills} kills, {writes} committed entries, none lost or corrupt; left over: {dict(left)}")


class Alarm(logging.Handler):
    """Collects every warning, because in a crowd each would be a fault."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def work_in_crowd(folder: str, seconds: str, seed: str) -> None:
    """Do everything at random for a while, and print the counts."""
    chance = random.Random(seed)
    counts = Counter[str]()
    alarm = Alarm()
    logging.getLogger("lookonce").addHandler(alarm)
    end = time.monotonic() + float(seconds)
    with Store(folder, limit_bytes=3_000_000) as store:
        while time.monotonic() < end:
            key, kind = make_key(chance.randrange(100)), chance.choice(KINDS)
            what = chance.choices(("get", "put", "note", "prune", "list", "check"), (60, 25, 10, 1, 2, 0.3))[0]
            counts[what] += 1
            if what == "get":
                payload = store.get(key, kind)
                counts["hit"] += payload is not None
                counts["wrong"] += payload not in (None, make_payload(key, kind))
            elif what == "put":
                counts["not kept"] += not store.put(key, kind, make_payload(key, kind))
            elif what == "note":
                counts["wrong"] += store.recall("picture", key) not in (None, key[::-1])
                store.remember("picture", key, key[::-1])
            elif what == "prune":
                store.prune(chance.randrange(3_000_000))
            elif what == "list":
                counts["over limit"] += store.stats().size_bytes > 3_000_000
            else:
                report = store.check()
                counts["wrong"] += not report.sound
    say(json.dumps({"counts": counts, "warnings": alarm.messages}))


def share_store(folder: Path, *, processes: int, seconds: float) -> None:
    """Let many processes work on one store from the same instant on, making it too."""
    workers = [start_worker("crowd", str(folder / "store"), str(seconds), str(n)) for n in range(processes)]
    total = Counter[str]()
    for worker in workers:
        output, errors = worker.communicate(timeout=seconds + 120)
        assert (worker.returncode, errors) == (0, ""), errors
        result = json.loads(output)
        assert result["warnings"] == []
        total += Counter(result["counts"])
    assert not {"wrong", "not kept", "over limit"} & set(total), total
    assert min(total[what] for what in ("hit", "put", "note")) > 0
    with Store(folder / "store", limit_bytes=3_000_000) as store:
        report = store.check()
        assert report.sound
        assert (report.missing, report.orphans) == ((), ())
    _logger.info(f"{processes} processes, {seconds:.0f} s: {dict(total)}")


def fill_and_leave(folder: str) -> None:
    """Leave the index with its write-ahead log, as a kill would."""
    store = Store(folder)
    fill(store)
    os._exit(0)


def fill(store: Store) -> None:
    for number in range(12):
        for kind in KINDS:
            assert store.put(make_key(number), kind, make_payload(make_key(number), kind)[:5_000])
        store.remember("picture", str(number), make_key(number))


def damage(path: Path, chance: random.Random) -> str:
    """Flip one to three bits of a file, or cut it."""
    size = path.stat().st_size
    if chance.random() < 0.2 or not size:
        os.truncate(path, chance.randrange(size + 1))
        return "cut"
    with path.open("r+b", buffering=0) as file:
        for _ in range(chance.randint(1, 3)):
            # Half of the flips in the first bytes, where the headers are.
            place = chance.randrange(min(size, chance.choice((128, 1 << 40))))
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return "flipped"


def use_everything(store: Store) -> Counter[str]:
    """Use a damaged store in every way; only misses may differ from a sound one."""
    counts = Counter[str]()
    for number in range(12):
        key = make_key(number)
        for kind in KINDS:
            payload = store.get(key, kind)
            assert payload in (None, make_payload(key, kind)[:5_000]), "a wrong payload"
            counts["hit" if payload is not None else "miss"] += 1
        note = store.recall("picture", str(number))
        assert note in (None, key), "a wrong note"
        counts["note" if note else "note missed"] += 1
    counts["put" if store.put(make_key(99), "look", b"new") else "put refused"] += 1
    assert store.get(make_key(99), "look") in (b"new", None)
    store.remember("picture", "new", "value")
    assert store.recall("picture", "new") in ("value", None)
    return counts


def damage_store(folder: Path, monkeypatch: pytest.MonkeyPatch, *, times: int, seed: int) -> None:
    """Damage one file of a store, at rest or in use, and see that it answers right or not at all and recovers."""
    chance = random.Random(seed)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here loses power
    with Store(folder / "closed") as store:
        fill(store)
    assert start_worker("leave", str(folder / "left")).communicate() == ("", "")
    assert (folder / "left" / "index.sqlite-wal").stat().st_size > 0
    total = Counter[str]()
    for number in range(times):
        place = folder / f"copy{number}"
        shutil.copytree(folder / chance.choice(("closed", "left")), place)
        in_use = chance.random() < 0.3
        with Store(place) as store:
            if in_use:
                use_everything(store)
            files = list(place.glob("objects/*/*/*"))
            index = sorted(place.glob("index.sqlite*"))
            target = chance.choice(index) if chance.random() < 0.7 else chance.choice(files)
            # To cut what a process has mapped into memory ends that process: SQLite's limit, not the store's.
            if not (in_use and target.suffix == ".sqlite-shm"):
                total[f"{damage(target, chance)} {target.suffix}{' in use' if in_use else ''}"] += 1
            total += use_everything(store)
            store.stats()
        with Store(place) as store:
            use_everything(store)
            store.check(repair=True)
            fill(store)
            after = use_everything(store)
            assert (after["miss"], after["note missed"], after["put refused"]) == (0, 0, 0), after
            report = store.check()
            assert report.sound, report
            assert (report.missing, report.orphans) == ((), ())
        shutil.rmtree(place)
    _logger.info(f"{times} times damaged: {dict(sorted(total.items()))}")


def run_mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def mount(*arguments: str) -> Iterator[None]:
    """Mount for a while; skip the test where that is not allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root may mount")
    try:
        run_mount(*arguments)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", arguments[-1]], check=True)


def fill_disk(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Put into a 2 MB disk until nothing more goes in; what went in stays, and room made is used again."""
    place = folder / "small"
    place.mkdir()
    with mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)), Store(place / "store") as store:
        kept: list[str] = []
        refused = 0
        for number in range(60):
            key = make_key(number)
            size = 100_000 if refused < 20 else 3_000
            if store.put(key, "look", key.encode() * (size // 64)):
                kept.append(key)
            else:
                refused += 1
            store.remember("picture", key, key)
            assert [record.levelname for record in caplog.records].count("WARNING") == refused
            assert store.recall("picture", key) in (None, key)
            for old in kept:
                assert bytes(store.get(old, "look") or b"").startswith(old.encode())
        assert len(kept) > 10
        assert refused > 20
        with Store(place / "store") as other:
            assert all(other.get(key, "look") for key in kept)
            assert other.check().corrupt == ()
        store.prune(500_000)
        assert store.put(make_key(1000), "look", bytes(100_000))
        assert store.check().sound
        _logger.info(f"2 MB disk: {len(kept)} kept, {refused} refused with a warning each")


def time_lookups(folder: Path, monkeypatch: pytest.MonkeyPatch, *, entries: int) -> None:
    """Fill a store to its limit and time it; the order of use and the limit hold."""
    size = HEADER_BYTES + 1000
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk's own time would hide the index's
    with Store(folder / "store", limit_bytes=entries * size) as store:
        puts_s = []
        for number in range(entries):
            start = time.perf_counter()
            assert store.put(make_key(number), KINDS[number % 2], bytes(1000))
            puts_s.append(time.perf_counter() - start)
        gets_s = []
        chance = random.Random(0)
        for _ in range(1000):
            number = chance.randrange(entries)
            key = make_key(number)
            start = time.perf_counter()
            assert store.get(key, KINDS[number % 2]) is not None
            gets_s.append(time.perf_counter() - start)
        store.get(make_key(0), "look")
        full_puts_s = []
        for number in range(entries, entries + entries // 10):
            start = time.perf_counter()
            assert store.put(make_key(number), KINDS[number % 2], bytes(1000))
            full_puts_s.append(time.perf_counter() - start)
        stats = store.stats()
        assert set(stats.kinds) == set(KINDS)
        assert (stats.entries, stats.size_bytes) == (entries, entries * size)
        found = [entry.key for entry in store.entries()]
        assert found[: entries // 10] == [make_key(n) for n in reversed(range(entries, entries + entries // 10))]
        assert found[entries // 10] == make_key(0)
    median_s = statistics.median(gets_s)
    first, last = (statistics.median(part) for part in (puts_s[: entries // 10], puts_s[-entries // 10 :]))
    assert median_s <= 0.002
    assert last <= 3 * first + 0.001, "the cost of a put grows with the store"
    _logger.info(
        f"{entries} entries: get median {median_s * 1e3:.2f} ms, worst of 1000 {max(gets_s) * 1e3:.1f} ms; "
        f"put {first * 1e3:.2f} ms in an empty store, {last * 1e3:.2f} ms in a full one, "
        f"{statistics.median(full_puts_s) * 1e3:.2f} ms with eviction"
    )


@pytest.mark.stress
def test_two_hundred_kills(tmp_path: Path) -> None:
    kill_writers(tmp_path, kills=200, seed=2)


@pytest.mark.stress
def test_eight_processes_for_a_minute(tmp_path: Path) -> None:
    share_store(tmp_path, processes=8, seconds=60.0)


@pytest.mark.stress
def test_five_hundred_damages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_store(tmp_path, monkeypatch, times=500, seed=2)


@pytest.mark.stress
def test_twenty_thousand_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_lookups(tmp_path, monkeypatch, entries=20_000)


if __name__ == "__main__":
    {"write": write_for_ever, "crowd": work_in_crowd, "leave": fill_and_leave}[sys.argv[1]](*sys.argv[2:])
