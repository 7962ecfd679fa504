"""The command line and the script that fetch a model."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hub_stub import HubStub
from lookonce.cards import read_cards
from pull_run import REPOSITORY, Place, card_text, sha256

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "download_model.py"
NAME = "qwen3-vl-2b-instruct"


@pytest.fixture(scope="module")
def published(tiny_pair: tuple[Path, Path]) -> dict[str, tuple[str, bytes]]:
    """A tiny pair under the names that the files of the shipped card have."""
    card = read_cards()[NAME]
    return {
        "text": (card.text_file().name, tiny_pair[0].read_bytes()),
        "projector": (card.projector_file().name, tiny_pair[1].read_bytes()),
    }


@pytest.fixture
def place(tmp_path: Path, published: dict[str, tuple[str, bytes]]) -> Place:
    """A user whose card of the shipped name tells the tiny files' sizes and hashes."""
    place = Place(tmp_path / "home")
    place.cards.write_text(card_text(NAME, published["text"], published["projector"]))
    return place


@pytest.fixture
def hub(place: Place, published: dict[str, tuple[str, bytes]]) -> Iterator[HubStub]:
    with HubStub({(REPOSITORY, name): content for name, content in published.values()}) as stub:
        place.environment |= {"HF_ENDPOINT": stub.url, "MODELSCOPE_ENDPOINT": stub.url}
        yield stub


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_the_two_commands_of_the_readme_fetch_a_model_and_ask_it(place: Place, hub: HubStub, source: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place.home / "cat.png")
    pulled = place.run(NAME, "--source", source)
    assert (pulled.status, pulled.out.count("\n"), pulled.err.count("\n")) == (0, 2, 1)
    ask = ("ask", "What is this?", "-i", "cat.png", "--model", NAME, "--max-tokens", "4", "--threads", "1")
    asked = place.run(*ask, "--n-ctx", "512", "--json", program=("-m", "lookonce"))
    assert (asked.status, asked.err) == (0, "")
    assert [image["source"] for image in json.loads(asked.out)["images"]] == ["encoded"]
    assert len(hub.transfers) == 2


def test_a_model_that_is_not_here_is_fetched_by_load_where_that_is_asked_for(place: Place, hub: HubStub) -> None:
    code = """
import sys
import lookonce
from lookonce.errors import ModelFileError

try:
    lookonce.load(sys.argv[1], threads=1, n_ctx=64)
except ModelFileError as error:
    print(error)
for _ in range(2):
    with lookonce.load(sys.argv[1], download=True, threads=1, n_ctx=64) as model:
        print(model.card.name)
"""
    run = place.run(NAME, program=("-c", code))
    assert (run.status, run.err) == (0, "")
    refusal, *loaded = run.out.splitlines()
    assert f"lookonce pull {NAME}" in refusal
    assert loaded == [NAME] * 2
    assert len(hub.transfers) == 2


def test_the_paths_go_to_stdout_and_what_was_done_to_stderr(
    place: Place, hub: HubStub, published: dict[str, tuple[str, bytes]]
) -> None:
    first, second = place.run(NAME), place.run(NAME)
    assert first.out == second.out
    for line, (name, content) in zip(first.out.splitlines(), published.values(), strict=True):
        assert Path(line).name == name
        assert Path(line).read_bytes() == content
    assert first.err.startswith(f"{NAME}: ")
    assert first.err.endswith("fetched from Hugging Face, verified\n")
    assert second.err.endswith("on the disk already, verified\n")


def test_a_pull_to_a_folder_ends_with_how_to_use_it(place: Place, hub: HubStub) -> None:
    pulled = place.run(f"{NAME}:q4_k_m", "--to", "my models")
    folder = place.home / "my models"
    assert (pulled.status, pulled.err.splitlines()[-1]) == (
        0,
        f"to use it: --model '{folder}', or LOOKONCE_MODELS_DIR='{folder}' and --model {NAME}:Q4_K_M",
    )
    ask = ("ask", "What?", "--threads", "1", "--max-tokens", "2", "--n-ctx", "512", "--model")
    assert place.run(*ask, folder, program=("-m", "lookonce")).status == 0
    (folder / "other.gguf").write_bytes(b"GGUF")
    said = place.run(NAME, "--to", "my models").err.splitlines()[-1]
    assert said.startswith(f"to use it: --model '{folder}/{pulled.out.splitlines()[0].rpartition('/')[2]}', or ")
    place.environment["LOOKONCE_MODELS_DIR"] = str(folder)
    assert place.run(NAME, "--to", "my models").err.splitlines()[-1] == f"to use it: --model {NAME}"
    assert place.run(*ask, f"{NAME}:Q4_K_M", program=("-m", "lookonce")).status == 0


def test_a_file_that_is_lost_is_fetched_again_and_the_other_is_not(place: Place, hub: HubStub) -> None:
    text, _ = place.run(NAME).out.splitlines()
    Path(text).resolve().unlink()
    hub.requests.clear()
    told = json.loads(place.run(NAME, "--json").out)
    assert (told["name"], told["text"]["source"], told["projector"]["source"]) == (NAME, "huggingface", None)
    assert len(hub.transfers) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("qwen3-vl-2b",), "perhaps qwen3-vl-2b-instruct or"),
        ((f"{NAME}:Q5_K_M",), "Q4_K_M, Q8_0"),
        ((f"{NAME}:Q8_0", "--quant", "Q4_K_M"), f"{NAME}:Q8_0 and --quant Q4_K_M were both given"),
        ((NAME, "--to", ""), "the folder for the model's files is ''"),
        ((NAME, "--quant", "Q5_K_M"), "Q4_K_M, Q8_0"),
        ((NAME, "--mmproj-type", "Q1"), "F16"),
        ((NAME, "--source", "elsewhere"), "auto, huggingface, modelscope"),
        (("qwen2.5-vl-3b-instruct", "--source", "modelscope"), "is not on modelscope"),
        ((), "NAME"),
    ],
)
def test_wrong_use_is_one_line_and_status_2_and_asks_no_hub(
    place: Place, hub: HubStub, arguments: tuple[str, ...], told: str
) -> None:
    run = place.run(*arguments)
    assert (run.status, run.out, run.err.count("\n")) == (2, "", 1)
    assert told in run.err
    assert hub.requests == []


def test_a_card_with_a_folder_of_its_own_has_nothing_to_fetch(place: Place, hub: HubStub) -> None:
    place.cards.write_text(
        '[own]\nfamily = "qwen3vl"\nlicence = "MIT"\nfolder = "here"\n'
        'text = { F16 = { file = "a.gguf" } }\nprojector = { F16 = { file = "b.gguf" } }\n'
    )
    run = place.run("own")
    assert (run.status, run.out) == (2, "")
    assert "a.gguf" in run.err
    (place.home / "here").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (place.home / "here" / name).write_bytes(b"GGUF")
    run = place.run("own")
    assert (run.status, run.err) == (0, "own: nothing to fetch\n")
    assert [Path(line).name for line in run.out.splitlines()] == ["a.gguf", "b.gguf"]
    run = place.run("own", "--to", "there")
    assert (run.status, run.out) == (2, "")
    assert "here already: leave out the folder 'there'" in run.err
    known = f'"b.gguf", sha256 = "{sha256(b"other")}"'
    place.cards.write_text(place.cards.read_text().replace('"b.gguf"', known))
    run = place.run("own")
    assert (run.status, run.out, run.err.count("\n")) == (1, "", 1)
    assert all(told in run.err for told in ("here/b.gguf", sha256(b"GGUF"), sha256(b"other")))
    assert hub.requests == []


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_bar_for_each_file_is_shown_on_a_terminal_and_none_of_the_clients_own(
    place: Place, hub: HubStub, source: str
) -> None:
    hub.faults.pause_s = 0.02
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lookonce", "pull", NAME, "--source", source],
        cwd=place.home,
        env=place.environment | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # as Linux ends what a terminal says
        while more := os.read(ours, 1 << 16):
            shown += more
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.count(b"\n")) == (0, 2)
    assert b"Fetching mmproj-" in shown
    assert b"Fetching Qwen3VL-" in shown
    assert b"MB/s" in shown
    assert b"%|" not in shown  # as the clients' bars have it


def test_the_script_does_what_the_command_does(place: Place, hub: HubStub) -> None:
    run = place.run(NAME, "--to", "models", "--json", program=(str(SCRIPT),))
    assert (run.status, run.err) == (0, "")
    told = json.loads(run.out)
    assert sha256(Path(told["text"]["path"]).read_bytes()) == told["text"]["sha256"]
    again = place.run(NAME, "--to", "models", program=(str(SCRIPT),))
    assert (again.status, again.out.count("\n")) == (0, 2)
    wrong = place.run("nothing-such", program=(str(SCRIPT),))
    assert (wrong.status, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert wrong.err.startswith("download_model: ")


def test_the_help_is_complete_and_loads_no_client(place: Place) -> None:
    code = """
import sys
from lookonce.cli import main
assert main(["pull", "--help"]) == 0
assert not {"huggingface_hub", "modelscope", "numpy", "llama_cpp"} & set(sys.modules)
"""
    run = place.run(program=("-c", code))
    assert (run.status, run.err) == (0, "")
    assert all(told in run.out for told in ("--quant", "--source", "--to", "--mmproj-type"))
