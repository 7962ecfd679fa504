"""States from the store give the logits of a prompt evaluated afresh, or are not used."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_state_kills as stress
from numpy.typing import NDArray
from PIL import Image

import lookonce
from look_maker import make_look, make_picture
from lookonce import engine, gguf_file, prefix_store
from lookonce.chat import Chat
from lookonce.engine import LoadOptions
from lookonce.errors import InputError, NativeError
from lookonce.fingerprint import Fingerprint
from lookonce.held import Held
from lookonce.kept_state import KeptState, KeptStates
from lookonce.model import Model
from lookonce.native.library import Device
from lookonce.native.text import Context
from lookonce.prefix_store import PrefixStore
from lookonce.prompt import Part, Prompt, RowRun, TokenRun
from lookonce.store import Store

Pair = tuple[Path, Path]
Logits = NDArray[np.float32]
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}
DEFAULT: dict[str, Any] = {}
SETTINGS = pytest.mark.parametrize("setting", [EXACT, DEFAULT, {"kv_type": "q8_0"}], ids=["exact", "default", "q8_0"])
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
A, B, C = (make_look(seed, (4, 5)) for seed in range(3))
LARGE = make_look(7, (24, 25))  # more rows than a batch


@pytest.fixture(scope="module")
def folder(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair in files so old that their fingerprints are remembered."""
    folder = tmp_path_factory.mktemp("settled")
    for path in tiny_pair:
        os.utime(shutil.copy(path, folder), (1e9, 1e9))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


def load(folder: Path, store: Store | bool, **options: Any) -> Model:
    return lookonce.load(folder, store=store, **{"threads": 1, "n_ctx": 2048, **options})


def logits(model: Model, prompt: str, looks: list[Any]) -> tuple[Logits, lookonce.Reply]:
    """The logits after a prompt."""
    reply = model.ask(prompt, looks, temperature=0, max_tokens=1)
    return model.engine._open_context().logits(), reply


def fresh(folder: Path, prompt: str, looks: list[Any], **options: Any) -> Logits:
    with load(folder, False, state="off", **options) as model:
        return logits(model, prompt, looks)[0]


def count(store: Store) -> int:
    kinds = store.stats().kinds
    return kinds["state"].entries if "state" in kinds else 0


PICTURES: dict[str, list[Any]] = {"one": [A], "three": [A, B, C], "of more rows than a batch": [LARGE]}


@SETTINGS
@pytest.mark.parametrize("case", PICTURES)
def test_a_restored_prompt_has_the_logits_of_one_evaluated_afresh(
    folder: Path, store: Store, setting: dict[str, Any], case: str
) -> None:
    looks = PICTURES[case]
    with load(folder, store, **setting) as model:
        assert logits(model, "What is it?", looks)[1].usage.prefix == "evaluated"
    assert count(store) == 1
    for question in ("What is it?", "Which colours has it, and why?"):
        with load(folder, store, **setting) as model:
            found, reply = logits(model, question, looks)
        assert reply.usage.prefix == "store"
        assert reply.usage.reused > sum(look.n_rows for look in looks)
        assert np.array_equal(found, fresh(folder, question, looks, **setting))
    assert count(store) == 1


def test_the_longest_kept_prefix_is_restored_and_only_the_rest_evaluated(folder: Path, store: Store) -> None:
    for looks in ([A], [A, B]):
        with load(folder, store) as model:
            model.ask("What?", looks, **GREEDY)
    assert count(store) == 2
    with load(folder, store) as model:
        found, reply = logits(model, "What?", [A, B, C])
        assert reply.usage.prefix == "store"
        assert 2 * A.n_rows < reply.usage.reused < 3 * A.n_rows
    assert np.array_equal(found, fresh(folder, "What?", [A, B, C]))
    assert count(store) == 3
    with load(folder, store) as model:
        assert model.ask("What?", [B, A], **GREEDY).usage.prefix == "evaluated"


def test_a_picture_answered_from_the_store_needs_no_tower_and_no_evaluation(folder: Path, store: Store) -> None:
    picture = make_picture(1, 300, 300)
    with load(folder, store) as model:
        cold = model.ask("What?", [picture], **GREEDY)
    with load(folder, store) as model:
        warm = model.ask("What?", [picture], **GREEDY)
        assert not model.tower_loaded
    assert warm.text == cold.text
    assert warm.usage.reused >= warm.usage.image_rows == 81
    assert (warm.usage.prefix, warm.images[0].source) == ("store", "store")


# --- in one process


def test_pictures_asked_about_in_turn_are_evaluated_once(folder: Path, store: Store) -> None:
    expected = {id(look): fresh(folder, "What?", [look]) for look in (A, B, C)}
    with load(folder, store) as model:
        origins = []
        for look in (A, B, C, A, B, C, A):
            found, reply = logits(model, "What?", [look])
            assert np.array_equal(found, expected[id(look)])
            origins.append(reply.usage.prefix if reply.usage.reused >= look.n_rows else "evaluated")
    assert origins == ["evaluated"] * 3 + ["memory"] * 4


@pytest.mark.parametrize("with_store", [False, True])
def test_chats_that_take_turns_do_not_evaluate_anything_twice(folder: Path, store: Store, with_store: bool) -> None:
    def talk(looks: list[Any], store: Store | bool) -> dict[int, list[tuple[str, int]]]:
        with load(folder, store) as model:
            chats = {id(look): model.chat([look]) for look in looks}
            turns: dict[int, list[tuple[str, int]]] = {name: [] for name in chats}
            for _ in range(4):
                for name, chat in chats.items():
                    reply = chat.ask("Why?", **GREEDY)
                    turns[name].append((reply.text, reply.usage.reused))
        return turns

    looks = [A, B, C]
    together = talk(looks, store if with_store else False)
    for look in looks:
        alone = talk([look], False)[id(look)]
        assert together[id(look)][1:] == alone[1:]
        assert all(reused > look.n_rows for _, reused in alone[1:])


@pytest.mark.parametrize("setting", [EXACT, DEFAULT], ids=["exact", "default"])
def test_after_twenty_turns_and_another_conversation_the_logits_are_those_of_no_interruption(
    folder: Path, setting: dict[str, Any]
) -> None:
    def talk(interrupted: bool) -> Logits:
        with load(folder, False, **setting) as model:
            chat = model.chat([A, B])
            for turn in range(20):
                chat.ask(f"Number {turn}?", temperature=0, max_tokens=3)
            if interrupted:
                model.ask("Something else?", [LARGE], **GREEDY)
                model.ask("And else?", [C], **GREEDY)
            usage = chat.ask("And?", temperature=0, max_tokens=1).usage
            assert usage.reused > 200
            return model.engine._open_context().logits()

    assert np.array_equal(talk(True), talk(False))


def test_a_question_beside_a_stream_under_way_copies_what_they_share(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []
    real = Context.copy

    def copy(self: Context, *arguments: Any, **options: Any) -> None:
        copies.append(arguments)
        real(self, *arguments, **options)

    with load(folder, False, n_ctx=256) as model:
        alone = model.ask("Why?", [A], **GREEDY).text
        with model.ask("What?", [A], stream=True, temperature=0, max_tokens=20) as stream:
            first = next(stream)
            monkeypatch.setattr(Context, "copy", copy)
            reply = model.ask("Why?", [A], **GREEDY)
            assert (reply.usage.reused >= A.n_rows, reply.usage.prefix) == (True, "memory")
            assert (reply.text, copies) == (alone, [(0, 1)])
            sequences = model.engine._sequences
            assert sequences is not None
            held = [slot.n_cells for slot in sequences._slots[:2]]
            assert 256 - sequences.room == sum(held) - reply.usage.reused
            rest = first + "".join(stream)
        with load(folder, False) as other:
            assert rest == other.ask("What?", [A], temperature=0, max_tokens=20).text


# --- what a state is found by


ALTERED: dict[str, dict[str, Any]] = {
    "K and V type": {"kv_type": "f32"},
    "flash attention": {"flash_attention": False},
    "batch size": {"n_ctx": 256},
    "threads": {"threads": 2},
}


@pytest.mark.parametrize("part", ALTERED)
def test_a_state_of_another_context_setting_is_not_used(folder: Path, store: Store, part: str) -> None:
    looks = [A, B]
    for options in ({}, ALTERED[part]):
        with load(folder, store, **options) as model:
            assert model.ask("What?", looks, **GREEDY).usage.prefix == "evaluated"
    assert count(store) == 2
    for options in ({}, ALTERED[part]):
        with load(folder, store, **options) as model:
            assert model.ask("What?", looks, **GREEDY).usage.prefix == "store"


def test_a_longer_context_uses_the_same_states(folder: Path, store: Store) -> None:
    for n_ctx, origin in ((1024, "evaluated"), (4096, "store")):
        with load(folder, store, n_ctx=n_ctx) as model:
            assert model.ask("What?", [A], **GREEDY).usage.prefix == origin


def test_every_fact_of_device_and_build_changes_the_key() -> None:
    devices = (Device("cuda:0", "a GPU", 1),)
    options = LoadOptions()
    context = options.context_options(1024)
    whole = options.facts(context, devices)
    others = [
        options.facts(context, ()),
        replace(options, n_gpu_layers=3).facts(context, devices),
        options.facts(context, (Device("cuda:1", "a GPU", 1),)),
        options.facts(context, (Device("cuda:0", "another GPU", 1),)),
    ]
    assert all(other != whole for other in others)
    assert replace(options, n_gpu_layers=3).facts(context, ()) == options.facts(context, ())
    assert set(whole) >= {"llama-cpp-python", "libllama", "ggml", "features"}


@pytest.mark.parametrize("name", ["llama-cpp-python", "libllama", "ggml", "features"])
def test_a_state_of_another_build_of_the_native_library_is_not_used(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with load(folder, store) as model:
        model.ask("What?", [A], **GREEDY)
    facts = engine.build()
    monkeypatch.setattr(engine, "build", lambda: {**facts, name: "another"})
    with load(folder, store) as model:
        assert model.ask("What?", [A], **GREEDY).usage.prefix == "evaluated"


def test_a_state_of_another_format_is_not_used(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, store) as model:
        model.ask("What?", [A], **GREEDY)
    monkeypatch.setattr(prefix_store, "FORMAT_VERSION", 2)
    with load(folder, store) as model:
        assert model.ask("What?", [A], **GREEDY).usage.prefix == "evaluated"


def test_a_state_belongs_to_the_text_models_content_not_its_name(folder: Path, store: Store, tmp_path: Path) -> None:
    text = next(folder.glob("Qwen*.gguf"))
    with load(folder, store) as model:
        model.ask("What?", [A], **GREEDY)

    def ask(path: Path, *origins: str) -> None:
        os.utime(path, (1e9, 1e9))
        for origin in origins:
            with load(path, store) as model:
                assert model.ask("What?", [A], **GREEDY).usage.prefix == origin

    ask(Path(shutil.copy(text, tmp_path / "renamed.gguf")), "store", "store")
    assert count(store) == 1
    tensor = gguf_file.read(text).tensors["output_norm.weight"]
    data = bytearray(text.read_bytes())
    data[tensor.offset] ^= 1
    (tmp_path / "altered.gguf").write_bytes(data)
    ask(tmp_path / "altered.gguf", "evaluated", "store")
    assert count(store) == 2


def test_a_state_is_used_where_what_the_model_hashes_to_cannot_be_noted(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder, store) as model:
        model.ask("What?", [A], **GREEDY)
    monkeypatch.setattr(Store, "recall", lambda *_: None)
    for mode in ("read", "on"):
        with load(folder, store, state=mode) as model:
            assert model.ask("What?", [A], **GREEDY).usage.prefix == "store"


def test_a_model_of_which_no_state_is_kept_is_not_read_before_its_first_answer(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "recall", lambda *_: None)
    with load(folder, store, state="read") as model:
        monkeypatch.setattr(Fingerprint, "read", lambda _: pytest.fail("the file was read"))
        assert model.ask("What?", [A], **GREEDY).usage.prefix == "evaluated"


def test_a_state_goes_before_its_looks(folder: Path, store: Store) -> None:
    looks = [replace(look, key=str(number) * 64) for number, look in enumerate((A, B), start=1)]
    for look in looks:
        store.put(look.key, "look", look.to_bytes())
    with load(folder, store) as model:
        model.ask("Compare.", looks, **GREEDY)
    store.prune(store.stats().size_bytes - 1)
    assert {entry.kind for entry in store.entries()} == {"look"}
    assert store.stats().entries == 2


def test_a_state_that_would_only_push_out_its_look_is_not_kept(folder: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "probe") as probe, load(folder, probe) as model:
        model.ask("What?", [A], **GREEDY)
        model.close()
        (state,) = probe.entries()
    for spare_bytes, kept in ((-1000, 0), (1000, 1)):
        limit_bytes = state.size_bytes + A.rows.nbytes + spare_bytes
        with Store(tmp_path / str(kept), limit_bytes=limit_bytes) as store:
            with load(folder, store) as model:
                model.ask("What?", [A], **GREEDY)
            assert count(store) == kept


def test_a_text_model_overwritten_in_place_is_not_taken_for_the_old_one(
    folder: Path, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copy(next(folder.glob("Qwen*.gguf")), tmp_path / "text.gguf"))
    os.utime(path, (1e9, 1e9))
    with load(path, store) as model:
        first = model.ask("What?", [A], **GREEDY).text
        while not count(store):  # it is written beside what follows
            time.sleep(0.01)
        os.utime(path, (1e9, 1.5e9))  # as a write would
        model.ask("What?", [B], **GREEDY)
        assert model.ask("What?", [A], **GREEDY).text == first
    assert count(store) == 1
    assert "was changed while the model was loaded" in caplog.text


def test_a_state_is_found_by_the_exact_tokens_and_rows_before_it(folder: Path, store: Store) -> None:
    with load(folder, store) as model:
        model.ask("Compare <image_1> with <image_2>.", [A, B], system="Be brief.", **GREEDY)
    altered = make_look(0, (4, 5))
    rows = altered.rows.copy()
    rows[3, 3] += 1
    object.__setattr__(altered, "rows", rows)
    renamed = make_look(0, (4, 5))
    object.__setattr__(renamed, "key", "f" * 64)
    moved = make_look(0, (4, 5))
    object.__setattr__(moved, "positions", moved.positions[::-1].copy())
    cases: list[tuple[str, str, list[Any]]] = [
        ("Compare <image_1> with <image_2>.", "Be brief!", [A, B]),
        ("Compare <image_1> and <image_2>.", "Be brief.", [A, B]),
        ("Compare <image_1> with <image_2>.", "Be brief.", [B, A]),
        *[("Compare <image_1> with <image_2>.", "Be brief.", [other, B]) for other in (altered, renamed, moved)],
    ]
    for prompt, system, looks in cases:
        with load(folder, store, state="read") as model:
            assert model.ask(prompt, looks, system=system, **GREEDY).usage.prefix == "evaluated"
    with load(folder, store, state="read") as model:
        reply = model.ask("Compare <image_1> with <image_2>. Why?", [A, B], system="Be brief.", **GREEDY)
        assert reply.usage.prefix == "store"


@pytest.mark.parametrize("changed", [{"advance": 4}, {"causal": False}, {"start": 1}, {"stop": 19}], ids=str)
def test_runs_of_one_look_that_differ_in_one_thing_alone_never_share_a_kept_state(
    folder: Path, store: Store, changed: dict[str, Any]
) -> None:
    text = Fingerprint(next(folder.glob("Qwen*.gguf")), store)
    text.value()
    states = PrefixStore(store, text, {}, 512, reads_only=False)
    run = RowRun(A, 0, 20, 5, causal=True)
    prompts = [Prompt((TokenRun((1, 2)), one, TokenRun((3,)))) for one in (run, replace(run, **changed))]
    for number, prompt in enumerate(prompts):
        held = Held.of(prompt.runs[:2])
        states.keep(KeptState(held, np.full(64, number, dtype=np.uint8), last=held.position - 1))
    states.close()
    assert count(store) == 2
    for number, prompt in enumerate(prompts):
        found = states.fetch(prompt, beyond=0)
        assert found is not None
        assert found.state.tolist() == [number] * 64


# --- damage


@pytest.mark.parametrize("place", [20, 300, 5_000, -1])
def test_a_flipped_byte_is_a_logged_miss(
    folder: Path, store: Store, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    with load(folder, store) as model:
        first = model.ask("What?", [A], **GREEDY).text
    (path,) = store.folder.glob("objects/*/*/*.state")
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with load(folder, store) as model:
        reply = model.ask("What?", [A], **GREEDY)
    assert (reply.text, reply.usage.prefix) == (first, "evaluated")
    assert "counts as missing" in caplog.text
    with load(folder, store) as model:  # it was written anew
        assert model.ask("What?", [A], **GREEDY).usage.prefix == "store"


def test_an_entry_that_verifies_and_is_another_state_is_a_logged_miss(
    folder: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    keys = []
    for looks in ([A], [A, B]):
        with load(folder, store) as model:
            model.ask("What?", looks, **GREEDY)
        keys.append(next(entry.key for entry in store.entries() if entry.kind == "state"))
    other = store.get(keys[1], "state")
    assert other is not None
    for payload in (other, b"", b"{}", other[:-1], bytes(other).replace(keys[1].encode(), keys[0].encode())):
        store.put(keys[0], "state", payload)
        caplog.clear()
        with load(folder, store, state="read") as model:
            assert model.ask("What?", [A], **GREEDY).usage.prefix == "evaluated"
        assert "evaluated again" in caplog.text


def test_a_state_that_the_native_library_refuses_is_evaluated_again(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with load(folder, store) as model:
        first = model.ask("What?", [A], **GREEDY).text

    def refuse(*_: Any, **__: Any) -> None:
        raise NativeError("refused")

    monkeypatch.setattr("lookonce.sequences.write_state", refuse)
    with load(folder, store) as model:
        reply = model.ask("What?", [A], **GREEDY)
        assert (reply.text, reply.usage.prefix) == (first, "evaluated")
    assert "a kept state is evaluated again: refused" in caplog.text


# --- what is kept, and when


def test_off_read_and_on_do_as_they_say(folder: Path, store: Store) -> None:
    for mode, origin, kept in (
        *[("off", "evaluated", 0), ("read", "evaluated", 0), ("on", "evaluated", 1), ("off", "evaluated", 1)],
        *[("read", "store", 1), ("on", "store", 1)],
    ):
        with load(folder, store, state=mode) as model:
            assert model.ask("What?", [A], **GREEDY).usage.prefix == origin
        assert count(store) == kept
    with pytest.raises(InputError, match="state is 'never': choose one of off, read, on"):
        load(folder, store, state="never")


def test_without_a_picture_nothing_is_kept(folder: Path, store: Store) -> None:
    with load(folder, store) as model:
        model.ask("What? " * 100, **GREEDY)
    assert count(store) == 0


def test_a_state_larger_than_the_stores_limit_is_not_kept_and_not_complained_about(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path / "small", limit_bytes=20_000) as small, load(folder, small) as model:
        model.ask("What?", [A], **GREEDY)
        assert count(small) == 0
    assert "WARNING" not in [record.levelname for record in caplog.records]


class SlowStore(Store):
    """Waits before each state until it may go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_write = threading.Event()

    def put(self, key: str, kind: str, payload: Any, *, label: str = "") -> bool:
        assert kind != "state" or self.may_write.wait(60)
        return super().put(key, kind, payload, label=label)


def test_the_answer_does_not_wait_for_the_disk_and_close_does(folder: Path, tmp_path: Path) -> None:
    store = SlowStore(tmp_path / "slow")
    model = load(folder, store)
    assert model.ask("What?", [A], **GREEDY).text
    assert count(store) == 0
    threading.Timer(0.2, store.may_write.set).start()
    model.close()
    assert count(store) == 1
    store.close()


def break_off(model: Model, how: str) -> None:
    chat = model.chat([A])
    stream = chat.ask("What?", stream=True, **GREEDY)
    next(stream)
    if how == "closed":
        stream.close()
    elif how == "forgotten":
        del stream
    elif how == "never read on":
        model.close()


@pytest.mark.parametrize("how", ["closed", "forgotten", "never read on"])
def test_a_stream_broken_off_leaves_its_state_all_the_same(folder: Path, store: Store, how: str) -> None:
    with load(folder, store) as model:
        break_off(model, how)
    assert count(store) == 1


def test_a_prefix_with_a_generated_reply_in_it_stays_out_of_the_store(folder: Path, store: Store) -> None:
    with load(folder, store) as model:
        chat = model.chat([A])
        chat.ask("What?", **GREEDY)
        chat.ask("And <image_2>?", [B], **GREEDY)
    assert count(store) == 1


ENDINGS = {
    "closed": "model.close()",
    "not closed": "",
    "forgotten": "del model",
    "a stream under way": "stream = model.ask('a', [picture], stream=True); next(stream); stream.close()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_may_end_at_once_and_its_state_is_kept(folder: Path, tmp_path: Path, ending: str) -> None:
    Image.fromarray(make_picture(1)).save(tmp_path / "picture.png")
    code = (
        f"import lookonce\npicture = {str(tmp_path / 'picture.png')!r}\n"
        f"model = lookonce.load({str(folder)!r}, store={str(tmp_path / 'store')!r}, threads=1, n_ctx=256)\n"
        "model.ask('What?', [picture], max_tokens=3)\n" + ENDINGS[ending]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Store(tmp_path / "store") as store:
        assert count(store) == 1


def test_kills_leave_no_damaged_state_and_no_other_answer(folder: Path, tmp_path: Path) -> None:
    stress.kill_askers(folder, tmp_path / "store", kills=4, seed=1)


def test_several_threads_share_states_and_answer_as_one_alone(folder: Path, store: Store) -> None:
    looks: list[Part] = [A, B, C]
    expected = [load_and_ask(folder, look) for look in looks]
    wrong: list[Any] = []
    with load(folder, store) as model:

        def work(number: int) -> None:
            chat = model.chat([looks[number % 3]])
            text = chat.ask("What?", **GREEDY).text
            if text != expected[number % 3]:
                wrong.append((number, text))
            chat.ask("Why?", **GREEDY)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert wrong == []
    assert count(store) == 3


def load_and_ask(folder: Path, look: Any) -> str:
    with load(folder, False) as model:
        return model.ask("What?", [look], **GREEDY).text


def test_a_conversation_larger_than_the_memory_for_states_is_evaluated_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder, False) as model:
        kept = model.engine._kept
        assert kept is not None
        monkeypatch.setattr(kept, "limit_bytes", 100_000)
        chat = model.chat()
        chat.ask("What? " * 100, **GREEDY)
        model.ask("Else?", **GREEDY)
        assert kept._states == []
        assert chat.ask("Why?", **GREEDY).usage.prefix == "evaluated"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_closing_in_a_forked_process_is_no_error(folder: Path, tmp_path: Path) -> None:
    code = f"""
import os, sys, warnings, numpy, lookonce
model = lookonce.load({str(folder)!r}, store={str(tmp_path)!r}, threads=1, n_ctx=256)
stream = model.ask("What?", [numpy.zeros((64, 64, 3), numpy.uint8)], stream=True)
next(stream)
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    model.close()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
model.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("7\n", "")
    with Store(tmp_path) as store:
        assert count(store) == 1


def test_memory_is_bounded_whatever_is_asked(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, store) as model:
        kept = model.engine._kept
        assert isinstance(kept, KeptStates)
        monkeypatch.setattr(kept, "limit_bytes", 200_000)
        chats: list[Chat] = []
        for seed in range(12):
            chats.append(model.chat([make_look(seed, (4, 5))]))
            chats[-1].ask("What?", **GREEDY)
            assert sum(state.state.nbytes for state in kept._states[:-1]) <= 200_000
        assert len(kept._states) < 12


def test_streams_that_nobody_goes_on_with_do_not_fill_the_memory(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder, store) as model:
        kept = model.engine._kept
        assert isinstance(kept, KeptStates)
        monkeypatch.setattr(kept, "limit_bytes", 200_000)
        streams = []
        for seed in range(8):
            streams.append(model.ask("What?", [make_look(seed, (4, 5))], stream=True, **GREEDY))
            next(streams[-1])
            streams.pop()
        owed = model.engine._sequences._owed  # type: ignore[union-attr]
        assert 1 <= len(owed) < 7
        assert sum(state.state.nbytes for state in owed[1:]) <= 200_000
        assert model.ask("What?", [make_look(0, (4, 5))], **GREEDY).text


def test_a_state_written_under_another_environment_of_the_native_library_is_not_used(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefix() -> str:
        with load(folder, store, kv_type="q8_0") as model:
            return model.ask("What?", [make_look()], **GREEDY).usage.prefix

    assert [prefix(), prefix()] == ["evaluated", "store"]
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    assert [prefix(), prefix()] == ["evaluated", "store"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
@pytest.mark.parametrize("what", ["close()", 'ask("What?")'])
def test_a_child_forked_during_another_threads_native_call_does_not_hang(folder: Path, what: str) -> None:
    code = f"""
import os, threading, time, lookonce
model = lookonce.load({str(folder)!r}, store=False, threads=1, n_ctx=256)
model.engine.lock.acquire()
child = os.fork()
if child == 0:
    try:
        model.{what}
    except lookonce.ClosedError:
        pass
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
model.engine.lock.release()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("7\n", "")
