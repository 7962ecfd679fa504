"""Pulls through the real clients of both hubs, from stub hubs with faults."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_stub import HubStub, Request
from pull_run import PROJECTOR, REPOSITORY, TEXT, Place, card_text, sha256

SMALL = {TEXT: random.Random(1).randbytes(300_000), PROJECTOR: random.Random(2).randbytes(200_000)}
LARGE = {TEXT: random.Random(3).randbytes(12_000_000), PROJECTOR: SMALL[PROJECTOR]}
BOTH = pytest.mark.parametrize("source", ["huggingface", "modelscope"])
TITLES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "home")
    write_card(place, SMALL)
    return place


@pytest.fixture
def hub(place: Place) -> Iterator[HubStub]:
    """The hub of both kinds, at which the place's clients ask."""
    with HubStub({(REPOSITORY, name): content for name, content in SMALL.items()}) as stub:
        place.environment |= {"HF_ENDPOINT": stub.url, "MODELSCOPE_ENDPOINT": stub.url}
        yield stub


@pytest.fixture
def large_hub(place: Place, hub: HubStub) -> HubStub:
    hub.files = {(REPOSITORY, name): content for name, content in LARGE.items()}
    write_card(place, LARGE)
    return hub


def write_card(place: Place, files: dict[str, bytes], *, hashes: bool = True) -> None:
    place.cards.write_text(card_text("tiny", (TEXT, files[TEXT]), (PROJECTOR, files[PROJECTOR]), hashes=hashes))


def check_pulled(told: object, files: dict[str, bytes], source: str | None) -> None:
    assert isinstance(told, dict)
    for kind, name in (("text", TEXT), ("projector", PROJECTOR)):
        content = files[name]
        assert Path(told[kind]["path"]).name == name
        assert Path(told[kind]["path"]).read_bytes() == content
        assert (told[kind]["size_bytes"], told[kind]["sha256"]) == (len(content), sha256(content))
        assert told[kind]["source"] == source


def client_finds(place: Place, source: str) -> Path:
    """Where the hub's own client finds the text model, with no network."""
    code = {
        "huggingface": "from huggingface_hub import hf_hub_download, scan_cache_dir\n"
        "found = hf_hub_download(sys.argv[1], sys.argv[2], local_files_only=True)\n"
        "assert not scan_cache_dir().warnings\n",
        "modelscope": "from modelscope import model_file_download\n"
        "found = model_file_download(sys.argv[1], sys.argv[2], revision='master', local_files_only=True)\n",
    }[source]
    run = place.run(REPOSITORY, TEXT, program=("-c", f"import sys\n{code}print(found)"))
    assert run.status == 0, run
    return Path(run.out.splitlines()[-1])


@BOTH
def test_a_pull_goes_to_the_hubs_own_cache_where_its_client_finds_it(place: Place, hub: HubStub, source: str) -> None:
    told = place.pull("--source", source)
    check_pulled(told, SMALL, source)
    root = place.hf_home if source == "huggingface" else place.modelscope_cache
    assert Path(told["text"]["path"]).is_relative_to(root)
    assert client_finds(place, source) == Path(told["text"]["path"])
    assert (place.partials, hub.sent_bytes) == ([], sum(map(len, SMALL.values())))


@BOTH
def test_a_second_pull_asks_nobody(place: Place, hub: HubStub, source: str) -> None:
    first = place.pull("--source", source)
    hub.requests.clear()
    again = place.pull("--source", source)
    check_pulled(again, SMALL, None)
    assert again["text"]["path"] == first["text"]["path"]
    assert hub.requests == []


@BOTH
def test_a_pull_to_a_folder_leaves_two_plain_files_there(place: Place, hub: HubStub, source: str) -> None:
    check_pulled(place.pull("--source", source, "--to", "new/models"), SMALL, source)
    assert sorted(path.name for path in (place.home / "new/models").iterdir()) == sorted(SMALL)
    assert not any(path.is_symlink() for path in place.models)
    check_pulled(place.pull("--to", "new/models"), SMALL, None)
    assert len(place.models) == 2


@BOTH
def test_a_token_goes_to_the_hub_and_not_to_where_it_sends_for_the_bytes(
    place: Place, hub: HubStub, source: str
) -> None:
    hub.faults.token = "a-token"
    place.environment |= {"HF_TOKEN": "a-token", "MODELSCOPE_API_TOKEN": "a-token"}
    check_pulled(place.pull("--source", source), SMALL, source)
    assert {one.token for one in hub.transfers} == {None}


@BOTH
@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
def test_a_connection_cut_at_random_bytes_is_gone_on_with(
    place: Place, large_hub: HubStub, source: str, reset: bool
) -> None:
    chance = random.Random(f"{source} {reset}")
    large_hub.faults.cuts = [chance.randrange(2_000_000, 6_000_000) for _ in range(2)]
    large_hub.faults.reset = reset
    large_hub.faults.pause_s = 0.002  # a reset takes from the client what it has not read yet
    check_pulled(place.pull("--source", source), LARGE, source)
    assert len(large_hub.transfers) == 4
    starts = [begin_of(one) for one in large_hub.transfers]
    assert 0 < starts[1] < starts[2]
    assert large_hub.sent_bytes < 1.3 * sum(map(len, LARGE.values()))
    assert place.partials == []


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_pull_is_gone_on_with_by_the_next(place: Place, large_hub: HubStub, source: str, seed: int) -> None:
    begun = kill_on_the_way(place, large_hub, random.Random(f"{source} {seed}"), "--source", source)
    check_pulled(place.pull("--source", source), LARGE, source)
    assert begin_of(large_hub.transfers[0]) == begun
    assert large_hub.sent_bytes == sum(map(len, LARGE.values())) - begun
    assert place.partials == []


def test_a_partial_file_in_a_folder_is_gone_on_with_from_the_other_hub(place: Place, large_hub: HubStub) -> None:
    begun = kill_on_the_way(place, large_hub, random.Random(7), "--source", "huggingface", "--to", "here")
    check_pulled(place.pull("--source", "modelscope", "--to", "here"), LARGE, "modelscope")
    assert begin_of(large_hub.transfers[0]) == begun


def begin_of(transfer: Request) -> int:
    return int((transfer.range or "bytes=0-").removeprefix("bytes=").partition("-")[0])


def kill_on_the_way(place: Place, hub: HubStub, chance: random.Random, *arguments: str) -> int:
    """Kill a pull after a random number of bytes; how many of them it has kept."""
    stop = chance.randrange(4_000_000, 11_000_000)
    hub.faults.pause_s = 0.002
    process = place.start("tiny", *arguments)
    while hub.sent_bytes < stop and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert place.models == []
    assert len(place.partials) == 1
    hub.faults.pause_s = 0
    hub.requests.clear()
    begun = place.partials[0].stat().st_size
    assert begun > stop / 2
    return begun


def test_a_partial_file_whose_beginning_is_damaged_is_fetched_anew(place: Place, large_hub: HubStub) -> None:
    begun = place.home / "here" / f".{TEXT}.{sha256(LARGE[TEXT])[:16]}.incomplete"
    begun.parent.mkdir()
    begun.write_bytes(bytes(1000))
    run = place.run("tiny", "--json", "--to", "here")
    check_pulled(json.loads(run.out), LARGE, "huggingface")
    assert "fetching all of it again" in run.err
    assert place.partials == []


@BOTH
def test_a_server_that_knows_no_ranges_costs_time_and_no_correctness(
    place: Place, large_hub: HubStub, source: str
) -> None:
    large_hub.faults.cuts = [4_000_000]
    large_hub.faults.no_ranges = True
    run = place.run("tiny", "--json", "--source", source)
    assert run.status == 0, run
    check_pulled(json.loads(run.out), LARGE, source)


@BOTH
@pytest.mark.parametrize("folder", [(), ("--to", "here")], ids=["cache", "folder"])
def test_wrong_bytes_are_named_with_both_hashes_and_deleted(
    place: Place, hub: HubStub, source: str, folder: tuple[str, ...]
) -> None:
    hub.faults.wrong_byte = 123_456
    error = place.refused("--source", source, *folder)
    wrong = bytearray(SMALL[TEXT])
    wrong[123_456] ^= 1
    assert TEXT in error
    assert TITLES[source] in error
    assert sha256(SMALL[TEXT]) in error
    assert sha256(bytes(wrong)) in error
    assert (place.partials, place.models) == ([], [])
    hub.faults.wrong_byte = None
    check_pulled(place.pull("--source", source, *folder), SMALL, source)


@BOTH
def test_a_hub_whose_file_is_another_than_the_cards_is_refused_before_a_byte(
    place: Place, hub: HubStub, source: str
) -> None:
    write_card(place, SMALL | {TEXT: SMALL[TEXT][::-1]})
    error = place.refused("--source", source)
    assert sha256(SMALL[TEXT]) in error
    assert sha256(SMALL[TEXT][::-1]) in error
    assert "models.toml" in error
    assert (hub.transfers, place.models) == ([], [])


@BOTH
def test_the_hubs_own_hash_serves_where_the_card_has_none_and_is_kept(place: Place, hub: HubStub, source: str) -> None:
    write_card(place, SMALL, hashes=False)
    hub.faults.wrong_byte = 5
    assert sha256(SMALL[TEXT]) in place.refused("--source", source)
    hub.faults.wrong_byte = None
    check_pulled(place.pull("--source", source), SMALL, source)
    hub.requests.clear()
    check_pulled(place.pull("--source", source), SMALL, None)
    assert hub.requests == []


@BOTH
def test_a_file_that_could_not_be_verified_is_not_fetched(place: Place, hub: HubStub, source: str) -> None:
    write_card(place, SMALL, hashes=False)
    hub.faults.no_hash = True
    assert "could not be verified" in place.refused("--source", source)
    assert hub.transfers == []


@BOTH
def test_404_names_the_repository_and_the_file(place: Place, hub: HubStub, source: str) -> None:
    error = place.refused("--quant", "q8_0", "--source", source)
    assert all(told in error for told in ("404", REPOSITORY, "none.gguf", TITLES[source]))
    hub.files = {("Owner/Other", TEXT): b"x"}
    error = place.refused("--source", source)
    assert all(told in error for told in ("404", REPOSITORY, TITLES[source]))
    assert place.models == []


@BOTH
def test_401_and_403_say_which_token_to_set(place: Place, hub: HubStub, source: str) -> None:
    token = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[source]
    hub.faults.token = "another"
    error = place.refused("--source", source)
    assert all(told in error for told in ("401", token, REPOSITORY))
    hub.faults.token, hub.faults.gated = None, True
    error = place.refused("--source", source)
    assert all(told in error for told in ("403", token, "licence", REPOSITORY))


def test_a_refusal_is_no_reason_to_ask_the_other_hub(place: Place, hub: HubStub) -> None:
    hub.faults.gated = True
    with HubStub(hub.files) as other:
        place.environment["MODELSCOPE_ENDPOINT"] = other.url
        assert "Hugging Face" in place.refused()
        assert other.requests == []


@pytest.mark.parametrize("fault", ["refused", "no such host", "503", "no hub"])
def test_a_hub_out_of_reach_hands_over_to_the_other(place: Place, hub: HubStub, fault: str) -> None:
    with HubStub({}) as down:
        down.faults.status = 200 if fault == "no hub" else 503
        if fault in ("503", "no hub"):
            place.environment["HF_ENDPOINT"] = down.url
        elif fault == "no such host":
            place.environment["HF_ENDPOINT"] = "http://hub.invalid"
        else:
            place.environment["HF_ENDPOINT"] = "http://127.0.0.1:1"
        run = place.run("tiny", "--json")
    check_pulled(json.loads(run.out), SMALL, "modelscope")
    assert run.err.count("\n") == 1
    assert "Hugging Face cannot be reached" in run.err
    assert "trying ModelScope" in run.err


def test_a_hub_that_does_not_answer_in_time_hands_over_to_the_other(place: Place, hub: HubStub) -> None:
    with HubStub({}) as silent:
        silent.faults.silent = True
        place.environment |= {"HF_ENDPOINT": silent.url, "HF_HUB_ETAG_TIMEOUT": "1"}
        run = place.run("tiny", "--json")
    check_pulled(json.loads(run.out), SMALL, "modelscope")


def test_both_hubs_out_of_reach_is_one_error_with_both_reasons(place: Place) -> None:
    began = time.monotonic()
    run = place.run("tiny")
    assert (run.status, run.out) == (1, "")
    warning, last = run.err.splitlines()
    assert warning.startswith("lookonce: warning: Hugging Face cannot be reached")
    for title in TITLES.values():
        assert f"{title} cannot be reached ([Errno 111] Connection refused)" in last
    assert last.endswith(
        "check the network and pull again, which goes on from here (run again with --verbose to see more)"
    )
    assert time.monotonic() - began < 30


@BOTH
def test_a_hub_that_is_silent_is_given_up_in_time_and_in_one_line(place: Place, source: str) -> None:
    with HubStub({}) as silent:
        silent.faults.silent = True
        place.environment |= {"HF_ENDPOINT": silent.url, "MODELSCOPE_ENDPOINT": silent.url}
        place.environment |= {"HF_HUB_ETAG_TIMEOUT": "1", "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "1"}
        error = place.refused("--source", source)
        assert f"{TITLES[source]} cannot be reached (" in error
        assert len(silent.requests) <= 2 or source == "huggingface"


def test_the_tries_that_a_user_has_set_for_modelscope_hold(place: Place) -> None:
    with HubStub({}) as down:
        down.faults.status = 503
        place.environment["MODELSCOPE_ENDPOINT"] = down.url
        for tries, set_ in ((2, {}), (3, {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3"})):
            place.environment |= set_
            down.requests.clear()
            assert "ModelScope cannot be reached (it answered 503)" in place.refused("--source", "modelscope")
            assert len(down.requests) == tries


def test_an_endpoint_that_is_no_address_is_one_sentence(place: Place) -> None:
    place.environment["HF_ENDPOINT"] = "notaurl"
    error = place.refused(status=2)
    assert error == (
        "lookonce: HF_ENDPOINT is 'notaurl': set it to a hub's address, which begins with https://, or unset it\n"
    )


def test_without_the_modelscope_package_the_pip_command_is_told(place: Place, hub: HubStub) -> None:
    hide = "import sys; sys.modules['modelscope'] = None; sys.argv[0] = 'lookonce'\n"
    hide += "import importlib.util; find = importlib.util.find_spec\n"
    hide += "importlib.util.find_spec = lambda name, *rest: None if name == 'modelscope' else find(name, *rest)\n"
    program = ("-c", f"{hide}from lookonce.__main__ import main; sys.exit(main())", "pull")
    run = place.run("tiny", "--source", "modelscope", program=program)
    assert (run.status, run.out, run.err.count("\n")) == (2, "", 1)
    assert "pip install 'lookonce[modelscope]'" in run.err
    place.environment["HF_ENDPOINT"] = "http://127.0.0.1:1"
    run = place.run("tiny", program=program)
    assert (run.status, run.out) == (1, "")
    assert "pip install 'lookonce[modelscope]'" in run.err.splitlines()[-1]


def test_offline_uses_what_is_there_and_else_says_so(place: Place, hub: HubStub) -> None:
    place.environment["HF_HUB_OFFLINE"] = "1"
    error = place.refused()
    assert "HF_HUB_OFFLINE" in error
    assert TEXT in error
    del place.environment["HF_HUB_OFFLINE"]
    place.pull()
    place.environment["HF_HUB_OFFLINE"] = "1"
    hub.requests.clear()
    check_pulled(place.pull(), SMALL, None)
    assert hub.requests == []


def test_what_the_hubs_own_client_fetched_is_taken_once_it_is_verified(place: Place, hub: HubStub) -> None:
    code = "import sys; from huggingface_hub import hf_hub_download as get; get(*sys.argv[1:])"
    for name in SMALL:
        assert place.run(REPOSITORY, name, program=("-c", code)).status == 0
    hub.requests.clear()
    check_pulled(place.pull(), SMALL, None)
    assert hub.requests == []


def test_a_damaged_file_in_the_cache_is_named_and_left_alone(place: Place, hub: HubStub) -> None:
    path = Path(place.pull()["text"]["path"]).resolve()
    damaged = b"X" + SMALL[TEXT][1:]
    path.write_bytes(damaged)
    error = place.refused()
    assert all(told in error for told in (str(path), sha256(damaged), sha256(SMALL[TEXT]), "delete"))
    assert path.read_bytes() == damaged
    path.unlink()
    check_pulled_text = place.pull()
    assert Path(check_pulled_text["text"]["path"]).read_bytes() == SMALL[TEXT]


def test_another_file_of_the_same_name_in_the_folder_is_named_and_left_alone(place: Place, hub: HubStub) -> None:
    (place.home / TEXT).write_text("mine")
    error = place.refused("--to", ".")
    assert all(told in error for told in (TEXT, sha256(b"mine"), sha256(SMALL[TEXT])))
    assert (place.home / TEXT).read_text() == "mine"
    assert hub.transfers == []


@pytest.mark.parametrize("kept_as", ["folder", "records"])
def test_a_place_that_cannot_be_written_to(place: Place, hub: HubStub, kept_as: str) -> None:
    (place.home / "taken").write_text("a file")
    if kept_as == "folder":
        assert "is a file" in place.refused("--to", "taken", status=2)
        error = place.refused("--to", "taken/models")
        assert all(told in error for told in ("taken/models", "cannot be written to", "--to"))
        assert hub.transfers == []
    else:  # only what would spare the next pull a question: the files are there and right
        write_card(place, SMALL, hashes=False)
        place.environment["XDG_DATA_HOME"] = str(place.home / "taken")
        run = place.run("tiny", "--json", "--to", "here")
        check_pulled(json.loads(run.out), SMALL, "huggingface")
        assert run.err.count("is not kept") == 2


@BOTH
def test_a_disk_without_room_is_told_before_the_first_byte(place: Place, hub: HubStub, source: str) -> None:
    write_card(place, SMALL, hashes=False)
    hub.faults.size_bytes = 10**15
    error = place.refused("--source", source)
    assert "needs 2000 TB more" in error
    assert "free some space" in error
    assert (hub.transfers, place.partials) == ([], [])


@BOTH
def test_a_disk_that_fills_up_keeps_what_it_has_taken(place: Place, large_hub: HubStub, source: str) -> None:
    # A limit on a file's size fails as a full disk does.
    code = "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000,) * 2)\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "from lookonce.__main__ import main; sys.exit(main())"
    run = place.run("tiny", "--source", source, program=("-c", code, "pull"))
    assert (run.status, run.out, run.err.count("\n")) == (1, "", 1)
    assert f"{place.partials[0].parent} takes no more" in run.err
    assert len(large_hub.transfers) == 1
    assert "free some space" in run.err
    assert [path.stat().st_size for path in place.partials] == [3_000_000]
    assert place.models == []
    large_hub.requests.clear()
    check_pulled(place.pull("--source", source), LARGE, source)
    assert begin_of(large_hub.transfers[0]) == 3_000_000


@BOTH
def test_a_hub_that_sends_more_than_it_published_fills_no_disk(place: Place, hub: HubStub, source: str) -> None:
    hub.faults.extra_bytes = 30_000_000
    hub.faults.pause_s = 0.001
    check_pulled(place.pull("--source", source), SMALL, source)
    assert place.partials == []
    assert hub.sent_bytes < 30_000_000


def test_a_hash_of_another_form_is_none(place: Place, hub: HubStub) -> None:
    write_card(place, SMALL, hashes=False)
    hub.faults.sha256 = "../../../x"
    assert "could not be verified" in place.refused("--source", "modelscope")
    assert (hub.transfers, place.partials) == ([], [])


def test_a_file_that_appears_under_the_name_meanwhile_is_left_alone(place: Place, large_hub: HubStub) -> None:
    large_hub.faults.pause_s = 0.002
    process = place.start("tiny", "--to", "here")
    while not large_hub.sent_bytes and process.poll() is None:
        time.sleep(0.001)
    mine = place.home / "here" / TEXT
    mine.write_text("mine")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert all(told in err for told in (str(mine), sha256(b"mine"), sha256(LARGE[TEXT]), "move or delete"))
    assert mine.read_text() == "mine"


def test_a_damaged_plain_file_in_place_of_the_caches_link_is_named_and_left_alone(place: Place, hub: HubStub) -> None:
    pointer = Path(place.pull()["text"]["path"])
    pointer.resolve().unlink()
    pointer.unlink()
    damaged = b"X" + SMALL[TEXT][1:]
    pointer.write_bytes(damaged)
    os.utime(pointer, (1e9, 1e9))
    for _ in range(2):
        error = place.refused()
        assert all(told in error for told in (str(pointer), sha256(damaged), sha256(SMALL[TEXT]), "move or delete"))
    assert pointer.read_bytes() == damaged


def test_a_link_of_the_cache_to_other_content_is_set_right(place: Place, hub: HubStub) -> None:
    pointer = Path(place.pull()["text"]["path"])
    pointer.unlink()
    (pointer.parent / "other").write_text("other")
    pointer.symlink_to("other")
    told = place.pull()
    assert Path(told["text"]["path"]) == pointer
    assert pointer.read_bytes() == SMALL[TEXT]
    assert (pointer.parent / "other").read_text() == "other"


def test_another_revision_on_the_card_is_fetched_and_found(place: Place, hub: HubStub) -> None:
    write_card(place, SMALL, hashes=False)
    first = place.pull()
    hub.revisions["v2"] = "f" * 40
    hub.files[REPOSITORY, TEXT] = SMALL[TEXT][::-1]
    place.cards.write_text(place.cards.read_text().replace("modelscope = ", 'revision = "v2"\nmodelscope = '))
    told = place.pull()
    assert Path(told["text"]["path"]).read_bytes() == SMALL[TEXT][::-1]
    assert Path(first["text"]["path"]).read_bytes() == SMALL[TEXT]
    assert (told["text"]["source"], told["projector"]["source"]) == ("huggingface", None)  # equal content is there
    hub.requests.clear()
    assert place.pull()["text"]["path"] == told["text"]["path"]
    assert hub.requests == []


@BOTH
def test_two_pulls_at_once_fetch_each_byte_once(place: Place, large_hub: HubStub, source: str) -> None:
    large_hub.faults.pause_s = 0.002
    both = [place.start("tiny", "--json", "--source", source) for _ in range(2)]
    told = []
    for process in both:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        told.append(json.loads(out))
    for kind, name in (("text", TEXT), ("projector", PROJECTOR)):
        assert told[0][kind]["path"] == told[1][kind]["path"]
        assert Path(told[0][kind]["path"]).read_bytes() == LARGE[name]
    assert large_hub.sent_bytes == sum(map(len, LARGE.values()))
    assert place.partials == []


@BOTH
def test_ctrl_c_ends_with_130_and_leaves_what_has_come(place: Place, large_hub: HubStub, source: str) -> None:
    large_hub.faults.pause_s = 0.002
    process = place.start("tiny", "--source", source)
    while large_hub.sent_bytes < 6_000_000 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "lookonce: interrupted\n")
    assert [path.stat().st_size > 3_000_000 for path in place.partials] == [True]
    assert place.models == []


def test_progress_tells_of_every_file_from_nothing_to_all(place: Place, hub: HubStub) -> None:
    code = """
import json, sys
from lookonce.cards import find_card
from lookonce.download import pull
steps = []
pulled = pull(find_card("tiny"), progress=steps.append)
assert pulled.text.name == sys.argv[1] and pulled.projector.name == sys.argv[2]
print(json.dumps([[step.file, step.doing, step.done_bytes, step.total_bytes] for step in steps]))
"""
    run = place.run(TEXT, PROJECTOR, program=("-c", code))
    assert (run.status, run.err) == (0, "")
    steps = json.loads(run.out)
    for name, content in SMALL.items():
        for doing in ("fetching", "checking"):
            told = [step for step in steps if step[:2] == [name, doing]]
            assert {step[3] for step in told} == {len(content)}
            assert [step[2] for step in told] == sorted(step[2] for step in told)
            assert told[-1][2] == len(content)
        assert next(step[2] for step in steps if step[:2] == [name, "fetching"]) == 0
