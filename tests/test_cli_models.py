"""`lookonce models`: what is known by name, where it is, and whether it is whole."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from card_maker import write_card
from lookonce import cli, fingerprint
from lookonce.cards import ModelCard, read_cards
from lookonce.fingerprint import hash_files, known_fingerprint
from lookonce.store import Store

Pair = tuple[Path, Path]


@pytest.fixture
def folder(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models with a pair that has a card, and no other card's files."""
    for path, name in zip(tiny_pair, ("one.gguf", "two.gguf"), strict=True):
        shutil.copy(path, tmp_path / name)
        os.utime(tmp_path / name, (1e9, 1e9))
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tmp_path))
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def card(folder: Path) -> ModelCard:
    return write_card(folder / "own.toml", folder / "one.gguf", folder / "two.gguf")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["models", *map(str, arguments)])
    return status, *capsys.readouterr()


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out)


def flip(path: Path, place: int = 1000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_the_list_has_every_card_with_size_licence_and_place(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "list")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert lines.keys() >= read_cards().keys()
    assert lines["tiny"].split()[1:4] == ["21.4", "MB", "MIT"]
    assert lines["tiny"].endswith("  on this disk")
    assert lines["qwen3-vl-2b-instruct"].split()[1:4] == ["1.55", "GB", "Apache-2.0"]
    assert lines["qwen3-vl-2b-instruct"].endswith("  not on this disk")
    assert all(len(line) <= 80 for line in lines.values() if line.endswith("on this disk"))
    (row,) = (one for one in told(capsys, "list") if one["name"] == "tiny")
    assert row == {"name": "tiny", "size_bytes": 21_446_784, "licence": "MIT", "folder": str(folder)}
    (folder / "two.gguf").unlink()
    assert next(one for one in told(capsys, "list") if one["name"] == "tiny")["folder"] is None
    assert re.search(r"^tiny .* half on this disk$", run(capsys, "list")[1], re.MULTILINE)


def test_the_columns_of_the_list_stand_below_each_other(card: ModelCard, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line for line in run(capsys, "list")[1].splitlines() if line.endswith("on this disk")]
    cards = read_cards()
    assert {line.index(cards[line.split()[0]].licence) for line in rows} == {rows[0].index("Apache")}
    assert {line.index(re.findall(r"(?:not |half )?on this disk", line)[0]) for line in rows} == {
        rows[0].index("not on this disk")
    }


def test_the_size_of_a_pair_on_this_disk_is_told_where_the_card_tells_none(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = folder / "own.toml"
    own.write_text(re.sub(r", size_bytes = \d+", "", own.read_text()))
    assert re.search(r"^tiny +21.4 MB ", run(capsys, "list")[1], re.MULTILINE)
    (folder / "two.gguf").unlink()
    assert re.search(r"^tiny +- ", run(capsys, "list")[1], re.MULTILINE)


def test_a_card_is_shown_with_its_files(card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "show", "Tiny")
    assert status == 0
    for said in ("me/Tiny.GGUF", "us/Tiny.GGUF", "text F32: one.gguf, 12.6 MB", str(folder / "two.gguf")):
        assert said in out
    facts = told(capsys, "show", "tiny")
    assert facts["family"] == "qwen3vl"
    assert [(one["kind"], one["type"], one["path"]) for one in facts["files"]] == [
        ("text", "F32", str(folder / "one.gguf")),
        ("projector", "F32", str(folder / "two.gguf")),
    ]
    assert facts["files"][0]["sha256"] == card.text_file().sha256


def test_where_prints_paths_and_ends_with_1_where_there_are_none(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "where", "tiny") == (0, f"{folder / 'one.gguf'}\n{folder / 'two.gguf'}\n", "")
    assert run(capsys, "where", "tiny:f32")[0] == 0
    assert run(capsys, "where", "qwen3-vl-2b-instruct") == (
        1,
        "",
        "lookonce: the files of qwen3-vl-2b-instruct are not on this disk: `lookonce pull qwen3-vl-2b-instruct` "
        "fetches them, 1.55 GB\n",
    )
    assert [one["type"] for one in told(capsys, "where", "tiny")] == ["F32", "F32"]


def test_where_names_the_missing_half_of_a_pair_and_what_fetches_it(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "two.gguf").rename(folder / "away")
    assert run(capsys, "where", "tiny") == (
        1,
        f"{folder / 'one.gguf'}\n",
        "lookonce: two.gguf, the projector of tiny, is not on this disk: `lookonce pull tiny` fetches it, 8.83 MB\n",
    )
    (folder / "one.gguf").unlink()
    (folder / "away").rename(folder / "two.gguf")
    status, out, errors = run(capsys, "where", "tiny", "--json")
    assert (status, len(json.loads(out))) == (1, 1)
    assert errors.startswith("lookonce: one.gguf, the text model of tiny, is not on this disk: ")


def test_a_quantization_after_a_name_leaves_the_others_out(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = folder / "own.toml"
    own.write_text(own.read_text().replace("[tiny.text]\n", '[tiny.text]\nF16 = { file = "half.gguf" }\n'))
    shutil.copy(folder / "one.gguf", folder / "half.gguf")
    assert run(capsys, "where", "tiny")[1].count("\n") == 3
    assert run(capsys, "where", "tiny:F32")[1] == f"{folder / 'one.gguf'}\n{folder / 'two.gguf'}\n"
    assert [one["type"] for one in told(capsys, "show", "tiny:f16")["files"]] == ["F16", "F32"]
    assert [one["type"] for one in told(capsys, "verify", "tiny:F32")] == ["F32", "F32"]
    (folder / "one.gguf").unlink()
    status, out, errors = run(capsys, "where", "tiny:F32")
    assert (status, out) == (1, f"{folder / 'two.gguf'}\n")
    assert (
        "one.gguf, the text model of tiny, is not on this disk: `lookonce pull tiny --quant F32` fetches it" in errors
    )
    assert run(capsys, "verify", "tiny:Q1")[0] == 2


def test_a_folder_of_models_that_does_not_exist_is_told(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(folder / "none"))
    said = f"LOOKONCE_MODELS_DIR is '{folder / 'none'}', which does not exist"
    assert f"the files of tiny are not on this disk ({said}): " in run(capsys, "where", "tiny")[2]
    assert f"({said})" in run(capsys, "verify", "tiny")[1]
    assert cli.main(["ask", "What?", "--model", "one.gguf"]) == 2
    assert f"'one.gguf' does not exist ({said}): give" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 0
    assert f"\n  {said}\n" in capsys.readouterr().out


def test_a_whole_model_is_verified_and_its_hashes_are_remembered(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "verify", "tiny") == (0, f"{folder / 'one.gguf'}: whole\n{folder / 'two.gguf'}: whole\n", "")
    assert [one["verdict"] for one in told(capsys, "verify", "tiny")] == ["whole", "whole"]
    with Store() as store:
        assert known_fingerprint(folder / "one.gguf", store) == card.text_file().sha256


def test_a_file_that_changes_behind_the_reading_is_not_remembered(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_and_change(paths: tuple[Path, ...]) -> str:
        found = hash_files(paths)
        flip(folder / "one.gguf")
        return found

    monkeypatch.setattr(fingerprint, "hash_files", hash_and_change)
    status, _, errors = run(capsys, "verify", "tiny")
    assert status == 2
    assert f"{folder / 'one.gguf'} was changed" in errors
    with Store() as store:
        assert known_fingerprint(folder / "one.gguf", store) is None


def test_a_file_that_may_be_several_cards_is_whole_if_it_is_one_of_them(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (folder / "one.gguf").read_bytes()
    flip(folder / "one.gguf")
    write_card(folder / "own.toml", folder / "one.gguf", folder / "two.gguf", name="another")
    (folder / "one.gguf").write_bytes(kept)
    assert run(capsys, "verify", folder / "one.gguf") == (0, f"{folder / 'one.gguf'}: whole\n", "")
    assert run(capsys, "verify", "tiny", "another")[:2] == (
        0,
        f"{folder / 'one.gguf'}: whole\n{folder / 'two.gguf'}: whole\n",
    )
    flip(folder / "one.gguf", 2000)
    status, out, _ = run(capsys, "verify", folder / "one.gguf")
    assert (status, out.count("DAMAGED"), out.count("\n")) == (1, 1, 1)


def test_a_card_that_was_named_and_is_not_on_this_disk_is_a_failure(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "verify", "qwen3-vl-2b-instruct")[:2] == (1, "none of these models is on this disk\n")
    status, out, _ = run(capsys, "verify", "tiny", "qwen3-vl-2b-instruct")
    assert (status, out.splitlines()[-1]) == (1, "qwen3-vl-2b-instruct: not on this disk")
    assert run(capsys, "verify", "qwen3-vl-2b-instruct", "--json")[:2] == (1, "[]\n")


def test_a_flipped_byte_is_told_with_the_file_and_both_hashes(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "verify", "tiny")[0] == 0
    flip(folder / "one.gguf")
    actual = hashlib.sha256((folder / "one.gguf").read_bytes()).hexdigest()
    for arguments in (["tiny"], [], [folder / "one.gguf"]):
        status, out, _ = run(capsys, "verify", *arguments)
        assert status == 1
        (line,) = (line for line in out.splitlines() if "DAMAGED" in line)
        assert line.startswith(f"{folder / 'one.gguf'}: ")
        assert actual in line
        assert f"{card.text_file().sha256} was expected: delete {folder / 'one.gguf'}, then `lookonce pull tiny" in line
    status, out, _ = run(capsys, "verify", "tiny", "--json")
    assert (status, [one["verdict"] for one in json.loads(out)]) == (1, ["damaged", "whole"])


def test_a_change_that_keeps_size_and_time_is_found_too(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "verify", "tiny")[0] == 0
    flip(folder / "two.gguf", -1)
    os.utime(folder / "two.gguf", (1e9, 1e9))
    assert run(capsys, "verify", "tiny")[0] == 1


def test_a_file_that_is_cut_short_is_damaged(card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "one.gguf", 1000)
    status, out, _ = run(capsys, "verify", "tiny")
    assert status == 1
    assert f"{folder / 'one.gguf'}: DAMAGED" in out


def test_a_file_whose_hash_nobody_told_is_not_called_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "one.gguf", folder / "Qwen3VL-2B-Instruct-F16.gguf")
    (folder / "own.toml").write_text("")
    actual = hashlib.sha256((folder / "one.gguf").read_bytes()).hexdigest()
    status, out, _ = run(capsys, "verify", "qwen3-vl-2b-instruct")
    assert (status, out) == (0, f"{folder / 'Qwen3VL-2B-Instruct-F16.gguf'}: sha256 {actual}, which no card tells\n")


def test_the_model_in_the_package_is_here_and_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.toml").write_text("")
    status, out, _ = run(capsys, "verify")
    assert (status, out.count("lookonce-demo"), out.count(": whole\n"), out.count("\n")) == (0, 2, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "qwen3-vl-2b"], "'qwen3-vl-2b' is no model's name: perhaps qwen3-vl-2b-instruct or "),
        (["verify", "nothing.gguf"], "nothing.gguf does not exist: check the path"),
        (["verify", "nothing"], "'nothing' is no model's name: `lookonce models list` shows all"),
        (["show"], "Missing argument 'NAME'"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (folder / "own.toml").write_text("")
    status, out, errors = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert errors.startswith(f"lookonce: {said}")
    assert errors.count("\n") == 1


def test_a_file_that_no_card_publishes_cannot_be_verified(
    card: ModelCard, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "one.gguf", folder / "mine.gguf")
    status, _, errors = run(capsys, "verify", folder / "mine.gguf")
    assert status == 2
    assert "no card has a file 'mine.gguf'" in errors


def test_a_malformed_card_of_the_users_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.toml").write_text('[mine]\nfamily = "llava"\n')
    status, _, errors = run(capsys, "list")
    assert status == 2
    assert f"{folder / 'own.toml'}, line 2: mine.family is 'llava'" in errors


def test_ask_with_a_name_that_is_not_on_this_disk_says_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.toml").write_text("")
    assert cli.main(["ask", "What?", "--model", "qwen3-vl-2b-instruct"]) == 2
    assert capsys.readouterr().err == (
        "lookonce: the files of qwen3-vl-2b-instruct are not on this disk: `lookonce pull qwen3-vl-2b-instruct` "
        "fetches them, 1.55 GB\n"
    )


def test_ask_takes_a_cards_name(card: ModelCard, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "What?", "--model", "tiny", "--threads", "1", "--max-tokens", "2", "--n-ctx", "512"]) == 0


def test_the_commands_load_no_native_library(card: ModelCard) -> None:
    import subprocess

    code = "import sys; from lookonce import cli; cli.main(sys.argv[1:]); sys.exit('llama_cpp' in sys.modules)"
    for arguments in (["list"], ["show", "tiny"], ["where", "tiny"], ["verify", "tiny"]):
        ended = subprocess.run([sys.executable, "-c", code, "models", *arguments], check=False, capture_output=True)
        assert ended.returncode == 0
