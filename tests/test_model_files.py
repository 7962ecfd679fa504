"""From what a user names to a model's two files."""

import logging
import shutil
from pathlib import Path

import pytest

from lookonce.errors import ModelFileError
from lookonce.model_files import find_files

Pair = tuple[Path, Path]


@pytest.fixture
def folder(tmp_path: Path, tiny_pair: Pair) -> Path:
    """A folder with a text model and its projector, under names that say nothing."""
    shutil.copy(tiny_pair[0], tmp_path / "one.gguf")
    shutil.copy(tiny_pair[1], tmp_path / "two.gguf")
    return tmp_path


def test_a_file_finds_the_projector_beside_it_whatever_its_name(folder: Path) -> None:
    files = find_files(folder / "one.gguf")
    assert files.text.path == folder / "one.gguf"
    assert files.projector is not None
    assert files.projector.path == folder / "two.gguf"
    assert not files.chosen


def test_a_folder_stands_for_the_one_text_model_in_it(folder: Path) -> None:
    for named in (folder, str(folder)):
        files = find_files(named)
        assert (files.text.path.name, files.projector and files.projector.path.name) == ("one.gguf", "two.gguf")


def test_a_projector_that_was_named_is_taken_as_chosen(folder: Path, tiny_pair: Pair) -> None:
    shutil.copy(tiny_pair[1], folder / "three.gguf")
    files = find_files(folder, folder / "three.gguf")
    assert files.projector is not None
    assert files.projector.path.name == "three.gguf"
    assert files.chosen


def test_a_model_without_a_projector_is_enough_to_replay(folder: Path) -> None:
    (folder / "two.gguf").unlink()
    assert find_files(folder).projector is None


def test_a_projector_of_another_family_is_not_taken_for_the_models(folder: Path, tiny_pair_25: Pair) -> None:
    shutil.copy(tiny_pair_25[1], folder / "other.gguf")
    files = find_files(folder)
    assert files.projector is not None
    assert files.projector.path.name == "two.gguf"
    (folder / "two.gguf").unlink()
    assert find_files(folder).projector is None


def test_a_projector_of_another_family_that_was_named_is_refused_with_both_names(
    folder: Path, tiny_pair_25: Pair
) -> None:
    with pytest.raises(ModelFileError, match=rf"{tiny_pair_25[1].name} is a projector for qwen2.5vl, but .*one\.gguf"):
        find_files(folder, tiny_pair_25[1])


def test_of_several_projectors_that_fit_none_is_taken_and_all_are_named(folder: Path, tiny_pair: Pair) -> None:
    shutil.copy(tiny_pair[1], folder / "three.gguf")
    files = find_files(folder)
    assert files.projector is None
    assert "several projector files fit one.gguf (three.gguf, two.gguf)" in files.missing


def test_several_text_models_are_refused_with_their_names_and_one_can_be_named(folder: Path, tiny_pair: Pair) -> None:
    shutil.copy(tiny_pair[0], folder / "three.gguf")
    with pytest.raises(ModelFileError, match=r"several text models \(one.gguf, three.gguf\)"):
        find_files(folder)
    assert find_files(folder / "three.gguf").projector is not None


@pytest.mark.parametrize("damage", ["cut", "zero", "header", "text"])
def test_a_damaged_file_that_nobody_named_is_passed_over_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = (folder / "two.gguf").read_bytes()
    broken = {"cut": whole[:-100], "zero": b"", "header": whole[:40] + b"\xff" * 8 + whole[48:], "text": b"# notes"}
    (folder / "broken.gguf").write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING, "lookonce.model_files"):
        files = find_files(folder)
    assert files.projector is not None
    assert files.projector.path.name == "two.gguf"
    assert [record.levelname for record in caplog.records if "broken.gguf" in record.message] == ["WARNING"] * len(
        caplog.records
    )
    assert caplog.records


def test_a_damaged_file_that_was_named_is_refused(folder: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-100])
        with pytest.raises(ModelFileError, match=name):
            find_files(folder / "one.gguf", folder / "two.gguf")
        (folder / name).write_bytes(whole)


def test_swapped_files_are_told_apart(folder: Path) -> None:
    with pytest.raises(ModelFileError, match=r"two\.gguf is a projector file .* but a text model was expected"):
        find_files(folder / "two.gguf")
    with pytest.raises(ModelFileError, match=r"one\.gguf is a text model .* but a projector file .* was expected"):
        find_files(folder / "one.gguf", folder / "one.gguf")
    with pytest.raises(ModelFileError, match=r"two\.gguf is a projector file"):
        find_files(folder / "two.gguf", folder / "one.gguf")


def test_what_does_not_exist_is_refused_by_its_name(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ModelFileError, match="'nothing' does not exist"):
        find_files("nothing")
    with pytest.raises(ModelFileError, match=r"nothing\.gguf"):
        find_files(folder / "one.gguf", "nothing.gguf")
    with pytest.raises(ModelFileError, match="holds no text model"):
        find_files(tmp_path_factory.mktemp("empty"))
    (folder / "one.gguf").unlink()
    with pytest.raises(ModelFileError, match="holds no text model"):
        find_files(folder)
    with pytest.raises(ModelFileError):
        find_files(folder / "two.gguf", folder)


def test_other_kinds_of_gguf_files_are_no_text_models(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "adapter.gguf", "qwen3vl")
    writer.add_string("general.type", "adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert find_files(folder).text.path.name == "one.gguf"
    with pytest.raises(ModelFileError, match="without token_embd"):
        find_files(folder / "adapter.gguf")


def test_the_later_parts_of_a_split_model_are_not_read_by_themselves(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "whole-00002-of-00002.gguf").write_bytes(b"read with its first part")
    with caplog.at_level(logging.WARNING, "lookonce.model_files"):
        assert find_files(folder).text.path.name == "one.gguf"
    assert not caplog.records


def test_a_home_folders_tilde_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_files(f"~/{folder.name}", f"~/{folder.name}/two.gguf").chosen
