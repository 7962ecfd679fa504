"""From what a user names to a model's two files."""

import hashlib
import logging
import shutil
from pathlib import Path

import pytest

import gguf_maker as maker
import lookonce
from card_maker import write_card
from gguf_maker import T
from look_maker import make_picture
from lookonce import fingerprint, model_files
from lookonce.cards import ModelCard, find_card
from lookonce.errors import InputError, ModelFileError
from lookonce.model_files import find_files, locate_card
from lookonce.remedy import none_here
from lookonce.store import Store

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
    assert files.chosen is None


def test_a_folder_stands_for_the_one_text_model_in_it(folder: Path) -> None:
    for named in (folder, str(folder)):
        files = find_files(named)
        assert (files.text.path.name, files.projector and files.projector.path.name) == ("one.gguf", "two.gguf")


def test_a_projector_that_was_named_is_taken_as_chosen(folder: Path, tiny_pair: Pair) -> None:
    shutil.copy(tiny_pair[1], folder / "three.gguf")
    files = find_files(folder, folder / "three.gguf")
    assert files.projector is not None
    assert files.projector.path.name == "three.gguf"
    assert files.chosen is files.projector


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


# --- which of several projectors


def name_keys(**names: str) -> maker.Keys:
    return {f"general.{key}": (T.STRING, value) for key, value in names.items()}


def test_of_several_that_fit_the_one_of_the_models_own_name_is_taken(tmp_path: Path) -> None:
    maker.write_text(tmp_path / "a.gguf", keys=name_keys(name="Qwen3 VL 2B Instruct"))
    maker.write_projector(tmp_path / "a-mmproj.gguf", keys=name_keys(name="Qwen3 VL 2B Thinking"))
    maker.write_projector(tmp_path / "b-mmproj.gguf", keys=name_keys(name="qwen3vl-2b-instruct"))
    files = find_files(tmp_path / "a.gguf")
    assert files.projector is not None
    assert files.projector.path.name == "b-mmproj.gguf"


def test_or_the_one_whose_name_has_the_same_parts(tmp_path: Path) -> None:
    parts = {"basename": "Qwen3-VL", "size_label": "2B", "finetune": "Instruct"}
    maker.write_text(tmp_path / "a.gguf", keys=name_keys(name="Model", **parts))
    maker.write_projector(tmp_path / "x.gguf", keys=name_keys(name="Vision", **parts))
    maker.write_projector(tmp_path / "y.gguf", keys=name_keys(name="Vision", **{**parts, "finetune": "Thinking"}))
    files = find_files(tmp_path / "a.gguf")
    assert files.projector is not None
    assert files.projector.path.name == "x.gguf"


def test_a_files_name_decides_nothing(tmp_path: Path) -> None:
    maker.write_text(tmp_path / "same.gguf", keys={"general.name": ()})
    for name in ("same-mmproj.gguf", "mmproj-same.gguf"):
        maker.write_projector(tmp_path / name, keys={"general.name": ()})
    missing = find_files(tmp_path / "same.gguf").missing
    assert "several projector files fit same.gguf (mmproj-same.gguf, same-mmproj.gguf)" in missing


def test_two_right_ones_are_refused_with_both_names_once_a_picture_needs_one(
    folder: Path, tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path_factory.mktemp("store")
    with lookonce.load(folder, store=store, threads=1, n_ctx=512) as model:
        look = model.look(make_picture(1))
        answer = model.ask("What?", [look], temperature=0, max_tokens=4).text
    shutil.copy(tiny_pair[1], folder / "three.gguf")
    with lookonce.load(folder, store=store, threads=1, n_ctx=512) as model:
        assert model.ask("What?", [look], temperature=0, max_tokens=4).text == answer
        with pytest.raises(ModelFileError, match=r"several projector files fit one.gguf \(three.gguf, two.gguf\)"):
            model.look(make_picture(1))


def test_a_flat_folder_of_many_models_gives_each_its_own_projector(
    tmp_path: Path, tiny_pair: Pair, tiny_pair_25: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stems = ("unsloth_Qwen3-VL-8B-Instruct-GGUF_", "ggml-org_Qwen2.5-VL-3B-Instruct-GGUF_")
    for stem, pair in zip(stems, (tiny_pair, tiny_pair_25), strict=True):
        shutil.copy(pair[0], tmp_path / f"{stem}text-Q4_K_M.gguf")
        shutil.copy(pair[1], tmp_path / f"{stem}mmproj-F16.gguf")
    maker.write_text(tmp_path / "other_text.gguf")
    maker.write_projector(tmp_path / "other_mmproj.gguf")
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tmp_path))
    for stem in stems:
        for named in (tmp_path / f"{stem}text-Q4_K_M.gguf", f"{stem}text-Q4_K_M.gguf"):
            files = find_files(named)
            assert files.projector is not None
            assert files.projector.path == tmp_path / f"{stem}mmproj-F16.gguf"


def test_a_split_model_finds_its_projector(tmp_path: Path) -> None:
    tensors = maker.text_tensors()
    half = len(tensors) // 2
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        keys = maker.text_keys() if number == 0 else {}
        keys |= {"split.no": (T.UINT16, number), "split.count": (T.UINT16, 2)}
        keys |= {"split.tensors.count": (T.INT32, len(tensors))}
        part = {name: tensors[name] for name in names}
        maker.write(tmp_path / f"m-{number + 1:05}-of-00002.gguf", keys, part)
    maker.write_projector(tmp_path / "mmproj.gguf")
    for named in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        files = find_files(named)
        assert len(files.text.parts) == 2
        assert files.projector is not None


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_missing_part_of_a_split_model_is_named(tmp_path: Path, lost: int) -> None:
    tensors = maker.text_tensors()
    names = list(tensors)
    for number in range(3):
        keys = maker.text_keys() if number == 0 else {}
        keys |= {"split.no": (T.UINT16, number), "split.count": (T.UINT16, 3)}
        keys |= {"split.tensors.count": (T.INT32, len(tensors))}
        maker.write(
            tmp_path / f"m-{number + 1:05}-of-00003.gguf", keys, {name: tensors[name] for name in names[number::3]}
        )
    maker.write_projector(tmp_path / "mmproj.gguf")
    assert find_files(tmp_path).projector is not None
    part = tmp_path / f"m-{lost:05}-of-00003.gguf"
    part.unlink()
    with pytest.raises(ModelFileError, match=rf"^{tmp_path} holds .*{part.name}") as caught:
        find_files(tmp_path)
    assert "\n" not in str(caught.value)
    assert "holds no text model: give" not in str(caught.value)
    if lost > 1:
        said = rf"m-00001-of-00003.gguf is the first of 3 parts, and {part.name} is not beside it: download all parts"
        with pytest.raises(ModelFileError, match=said):
            find_files(tmp_path / "m-00001-of-00003.gguf")


def test_why_no_file_of_a_folder_will_do_is_said_in_the_error_and_nowhere_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "one.gguf").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"holds no text model that can be used: .*one\.gguf is empty"):
        find_files(folder)
    assert not caplog.records


def test_a_damaged_file_is_passed_over_with_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "broken.gguf").write_bytes(b"")
    for named in (folder, folder / "one.gguf"):
        caplog.clear()
        assert find_files(named).projector is not None
        assert len(caplog.records) == 1


def test_a_projectors_folder_stands_for_the_one_in_it_that_fits(
    folder: Path, tiny_pair: Pair, tiny_pair_25: Pair, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(ModelFileError, match=rf"no projector file fits one.gguf in {other}: give the projector file"):
        find_files(folder / "one.gguf", other)
    shutil.copy(tiny_pair[1], other / "p.gguf")
    shutil.copy(tiny_pair_25[1], other / "q.gguf")
    files = find_files(folder / "one.gguf", other)
    assert files.projector is not None
    assert files.projector.path == other / "p.gguf"
    assert files.chosen is files.projector
    shutil.copy(tiny_pair[1], other / "r.gguf")
    with pytest.raises(ModelFileError, match=r"several projector files fit one.gguf \(p.gguf, r.gguf\): give the"):
        find_files(folder, other)


# --- cards


@pytest.fixture
def card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    """A card for the two files, in a folder of models."""
    monkeypatch.setenv("LOOKONCE_MODELS", str(folder / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(folder))
    return write_card(folder / "own.toml", folder / "one.gguf", folder / "two.gguf", pooling="mean", n_ctx=128)


def test_a_cards_name_stands_for_its_files(card: ModelCard, folder: Path) -> None:
    for name in ("tiny", "Tiny", "tiny:F32", "tiny:f32"):
        files = find_files(name)
        assert files.card == card
        assert files.text.path == folder / "one.gguf"
        assert files.projector is not None
        assert files.projector.path == folder / "two.gguf"
        assert files.chosen is None


def test_the_cards_projector_is_taken_among_others_that_fit(card: ModelCard, folder: Path, tiny_pair: Pair) -> None:
    shutil.copy(tiny_pair[1], folder / "three.gguf")
    files = find_files("tiny")
    assert files.projector is not None
    assert files.projector.path.name == "two.gguf"
    named = find_files("tiny", folder / "three.gguf")
    assert named.projector is not None
    assert (named.projector.path.name, named.card) == ("three.gguf", card)
    assert named.chosen is named.projector


def test_a_cards_other_projector_on_this_disk_will_do(card: ModelCard, folder: Path) -> None:
    with (folder / "own.toml").open("a") as file:
        file.write('F16 = { file = "other.gguf" }\n')
    (folder / "two.gguf").rename(folder / "other.gguf")
    files = find_files("tiny")
    assert files.projector is not None
    assert files.projector.path.name == "other.gguf"


def test_a_card_that_is_not_on_this_disk_says_what_fetches_it_and_how_much(card: ModelCard, folder: Path) -> None:
    size = (folder / "one.gguf").stat().st_size + (folder / "two.gguf").stat().st_size
    (folder / "two.gguf").rename(folder / "away")
    files = find_files("tiny")
    assert files.projector is None
    assert files.missing == (
        "two.gguf, the projector of tiny, is not on this disk: `lookonce pull tiny` fetches it, 8.83 MB, or use a "
        "saved look"
    )
    (folder / "one.gguf").unlink()
    with pytest.raises(ModelFileError, match=r"the files of tiny are not on this disk: `lookonce pull tiny` fetches"):
        find_files("tiny")
    assert none_here(card).endswith(f"`lookonce pull tiny` fetches them, {size / 1e6:.1f} MB")
    assert locate_card(card).text is None


def test_a_quantization_that_the_card_has_not_is_refused(card: ModelCard) -> None:
    with pytest.raises(InputError, match="tiny has no quantization 'Q9': choose one of F32"):
        find_files("tiny:Q9")


def test_what_is_missing_is_fetched_where_that_is_allowed(card: ModelCard, folder: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(wanted: ModelCard, quantization: str | None) -> None:
        asked.append((wanted.name, quantization))
        (folder / "away").rename(folder / "one.gguf")

    assert find_files("tiny", fetch=fetch).projector is not None
    assert asked == []
    (folder / "one.gguf").rename(folder / "away")
    assert find_files("tiny:F32", fetch=fetch).text.path.name == "one.gguf"
    assert asked == [("tiny", "F32")]


def test_a_file_that_a_card_publishes_has_the_card_by_its_name_and_size(card: ModelCard, folder: Path) -> None:
    assert find_files(folder).card == card
    assert find_files(folder / "one.gguf").card == card
    shutil.copy(folder / "one.gguf", folder / "me_Tiny.GGUF_one.gguf")
    assert find_files(folder / "me_Tiny.GGUF_one.gguf").card == card
    shutil.copy(folder / "one.gguf", folder / "four.gguf")
    assert find_files(folder / "four.gguf").card is None
    with (folder / "one.gguf").open("ab") as file:
        file.write(bytes(32))
    assert find_files(folder / "one.gguf").card is None


def test_a_folder_of_a_cards_name_is_given_as_a_path(
    card: ModelCard, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    shutil.copytree(folder, "tiny")
    assert find_files("tiny").text.path == folder / "one.gguf"
    assert find_files("./tiny").text.path == Path("tiny/one.gguf")
    assert find_files(Path("tiny")).text.path == Path("tiny/one.gguf")


def test_a_card_with_a_folder_needs_no_hub(card: ModelCard, folder: Path) -> None:
    (folder / "built").mkdir()
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(folder / name, folder / "built" / name)
    own = folder / "own.toml"
    write_card(
        own, folder / "one.gguf", folder / "two.gguf", name="inside", folder="built", huggingface=None, modelscope=None
    )
    assert find_files("inside").text.path == folder / "built" / "one.gguf"
    (folder / "built" / "one.gguf").unlink()
    with pytest.raises(ModelFileError, match=r"the files of inside are not in .*built: put them back"):
        find_files("inside")


def test_a_name_that_is_neither_card_nor_file_is_refused_with_those_near_it() -> None:
    for typo in ("qwen3-vl-2b-instuct", "qwen3-vl-2b-instuct:Q8_0"):
        with pytest.raises(ModelFileError, match=rf"'{typo}' does not exist: give .*; perhaps qwen3-vl-2b-instruct or"):
            find_files(typo)
    with pytest.raises(ModelFileError, match=r"or a model's name; `lookonce models list` shows all$"):
        find_files("nothing/at/all.gguf")


def test_a_cards_name_as_a_path_is_told_how_to_give_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("qwen3-vl-2b-instruct", "Qwen3-VL-2B-Instruct:Q8_0"):
        with pytest.raises(
            ModelFileError, match=rf"'{name}' is a model's name and no file or folder: give it as a str"
        ):
            find_files(Path(name))


def test_a_cards_options_hold_where_none_are_given(card: ModelCard, folder: Path) -> None:
    with lookonce.load("tiny", store=False, threads=1) as model:
        assert model.card == card
        assert model.n_ctx == 128
    with lookonce.load("tiny", store=False, threads=1, n_ctx=64) as model:
        assert model.n_ctx == 64
    (folder / "own.toml").unlink()
    write_card(folder / "own.toml", folder / "one.gguf", folder / "two.gguf", min_pixels=4096, max_pixels=8192)
    with lookonce.load("tiny", store=False, threads=1) as model:
        assert model.look(make_picture(1, 300, 200)).grid == (2, 3)
        assert model.look(make_picture(1, 300, 200), max_pixels=20_000).n_rows > 6
    with lookonce.load(folder / "one.gguf", mmproj=folder / "two.gguf", store=False, threads=1) as model:
        assert model.card is not None


def test_a_card_of_another_family_than_its_file_is_refused(
    card: ModelCard, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = folder / "own.toml"
    own.write_text(own.read_text().replace('"qwen3vl"', '"qwen2.5vl"'))
    with pytest.raises(ModelFileError, match=r"one.gguf is of the family qwen3vl, but tiny has qwen2.5vl as family on"):
        find_files("tiny")
    assert find_files(folder / "one.gguf").card is None
    assert not caplog.records


def test_a_cards_projector_of_another_family_is_refused(
    folder: Path, tiny_pair_25: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(folder / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(folder))
    shutil.copy(tiny_pair_25[0], folder / "one.gguf")
    shutil.copy(tiny_pair_25[1], folder / "two.gguf")
    write_card(folder / "own.toml", folder / "one.gguf", folder / "two.gguf", family="qwen2vl")
    with pytest.raises(ModelFileError, match=r"two.gguf is of the family qwen2.5vl, but tiny has qwen2vl as family on"):
        find_files("tiny")


def test_a_longer_context_than_the_model_was_trained_for_is_cut_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(folder / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(folder))
    write_card(folder / "own.toml", folder / "one.gguf", folder / "two.gguf", n_ctx=1_000_000)
    with lookonce.load("tiny", store=False, threads=1) as model:
        assert model.n_ctx == 32_768
    (said,) = [record.message for record in caplog.records if "n_ctx" in record.message]
    assert said.startswith("tiny has 1000000 as n_ctx on its card, but one.gguf was trained for 32768, which is taken")


def test_cards_that_cannot_be_read_stop_names_and_not_files(
    card: ModelCard, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "own.toml").write_text("[mine]\nfamily = 5\n")
    monkeypatch.chdir(folder)
    for named in (folder, folder / "one.gguf", "one.gguf"):
        caplog.clear()
        assert find_files(named).projector is not None
        (said,) = [record.message for record in caplog.records]
        assert said.startswith(f"your own cards are left out: {folder / 'own.toml'}, line 2: mine.family is 5")
    for name in ("mine", "qwen3-vl-2b-instruct"):
        with pytest.raises(ModelFileError, match=r"own.toml, line 2: mine.family is 5"):
            find_files(name)


def test_what_is_passed_over_is_told_once_also_where_all_is_searched_again(
    card: ModelCard, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(*_: object) -> None:
        (folder / "deep").mkdir()
        (folder / "right").rename(folder / "deep" / "one.gguf")

    shutil.copy(folder / "one.gguf", folder / "right")
    (folder / "one.gguf").write_bytes(b"cut")
    assert find_files("tiny", fetch=fetch).text.path == folder / "deep" / "one.gguf"
    assert len([record for record in caplog.records if "has 3 bytes" in record.message]) == 1


# --- content that is not what is published


def flip(path: Path) -> str:
    """Change the file's last weight; give the SHA-256 that it then has."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["one.gguf", "two.gguf"])
@pytest.mark.parametrize("with_store", [True, False])
def test_a_cards_file_of_another_content_is_refused_with_both_hashes(
    card: ModelCard, folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, with_store: bool
) -> None:
    expected = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    actual = flip(folder / name)
    store = tmp_path_factory.mktemp("store") if with_store else False
    with pytest.raises(ModelFileError) as caught:
        lookonce.load("tiny", store=store, threads=1)
    said = str(caught.value)
    assert said.startswith(
        f"{folder / name} is not the file that tiny means: its SHA-256 is {actual}, expected {expected}: "
        f"delete {folder / name}, then `lookonce pull tiny --to {folder}` fetches it again, or give its path in place"
    )
    assert "\n" not in said


def test_a_right_copy_is_taken_in_place_of_a_damaged_one(
    card: ModelCard, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "deep").mkdir()
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(folder / name, folder / "deep" / name)
        flip(folder / name)
    files = find_files("tiny")
    assert (files.text.path, files.projector and files.projector.path) == (
        folder / "deep" / "one.gguf",
        folder / "deep" / "two.gguf",
    )
    assert files.verified == (folder / "deep" / "one.gguf", folder / "deep" / "two.gguf")
    assert f"passed over for {folder / 'deep' / 'one.gguf'}: {folder / 'one.gguf'} is not the file" in caplog.text


def test_what_is_fetched_is_taken_in_place_of_a_damaged_one(card: ModelCard, folder: Path) -> None:
    def fetch(*_: object) -> None:
        (folder / "fetched").mkdir()
        (folder / "right").rename(folder / "fetched" / "one.gguf")

    shutil.copy(folder / "one.gguf", folder / "right")
    flip(folder / "one.gguf")
    assert find_files("tiny", fetch=fetch).text.path == folder / "fetched" / "one.gguf"


def test_a_hash_that_the_hub_told_counts_too(
    card: ModelCard, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
    own = folder / "own.toml"
    own.write_text(
        "\n".join(line.partition(", size")[0] + " }" * (", size" in line) for line in own.read_text().split("\n"))
    )
    told = card.text_file()
    plain = find_card("tiny")
    assert plain is not None
    monkeypatch.setattr(model_files.published, "complete", lambda _, file: told if file.name == told.name else file)
    assert find_files("tiny").text.path == folder / "one.gguf"
    flip(folder / "one.gguf")
    with pytest.raises(ModelFileError, match=r"one\.gguf is not the file that tiny means"):
        find_files("tiny")


def test_a_file_given_by_its_path_is_taken_with_a_warning(
    card: ModelCard, folder: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path_factory.mktemp("store")) as store:
        assert find_files(folder / "one.gguf", store=store).card == card
        assert not caplog.records
        actual = flip(folder / "one.gguf")
        assert find_files(folder / "one.gguf", store=store).card == card
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(
        f"{folder / 'one.gguf'} has the name and size of a file of tiny, and is another: its SHA-256"
    )
    assert actual in said
    assert str(card.text_file().sha256) in said


def test_what_is_known_of_a_cards_files_costs_no_reading(
    card: ModelCard, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path_factory.mktemp("store")) as store:
        find_files("tiny", store=store)

        def read(*_: object) -> str:
            raise AssertionError("a file was read through")

        monkeypatch.setattr(fingerprint, "hash_files", read)
        assert len(find_files("tiny", store=store).verified) == 2


# --- projectors that are called the same for every model


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models, one to a folder, and a card for that in the last, whose sizes and hashes are not known."""
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tmp_path))
    (tmp_path / "own.toml").write_text(
        '[mine]\nfamily = "qwen3vl"\nlicence = "MIT"\nhuggingface = "me/Mine"\n'
        'text.F32 = { file = "mine.gguf" }\nprojector.F16 = { file = "mmproj-F16.gguf" }\n'
    )
    (tmp_path / "zzz-mine").mkdir()
    (tmp_path / "aaa-other").mkdir()
    maker.write_text(tmp_path / "zzz-mine" / "mine.gguf", keys=name_keys(name="Mine"))
    return tmp_path


def test_the_projector_beside_the_text_model_goes_before_those_of_other_models(shelf: Path) -> None:
    maker.write_projector(shelf / "aaa-other" / "mmproj-F16.gguf", keys=name_keys(name="Other"))
    maker.write_projector(shelf / "zzz-mine" / "mmproj-F16.gguf", keys=name_keys(name="Mine"))
    files = find_files("mine")
    assert files.projector is not None
    assert files.projector.path == shelf / "zzz-mine" / "mmproj-F16.gguf"


def test_of_the_others_one_that_does_not_fit_is_passed_over(
    shelf: Path, tiny_pair_25: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tiny_pair_25[1], shelf / "aaa-other" / "mmproj-F16.gguf")
    missing = find_files("mine").missing
    stray = shelf / "aaa-other" / "mmproj-F16.gguf"
    assert missing.startswith(
        f"mmproj-F16.gguf, the projector of mine, is not on this disk ({stray} is of another model): `lookonce pull"
    )
    (shelf / "bbb").mkdir()
    maker.write_projector(shelf / "bbb" / "mmproj-F16.gguf", keys=name_keys(name="Mine"))
    files = find_files("mine")
    assert files.projector is not None
    assert files.projector.path == shelf / "bbb" / "mmproj-F16.gguf"
    assert str(stray) in caplog.text


def test_a_projector_that_calls_itself_otherwise_is_taken_with_a_warning(
    shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = maker.write_projector(shelf / "aaa-other" / "mmproj-F16.gguf", keys=name_keys(name="Other"))
    for named in ("mine", shelf / "zzz-mine" / "mine.gguf"):
        caplog.clear()
        files = find_files(named)
        assert files.projector is not None
        (said,) = [record.message for record in caplog.records]
        assert f"{files.projector.path} calls itself 'Other' and the text model" in said
        shutil.copy(other, shelf / "zzz-mine" / "any.gguf")


def test_projectors_that_do_not_fit_are_listed(folder: Path, tiny_pair_25: Pair) -> None:
    (folder / "two.gguf").unlink()
    shutil.copy(tiny_pair_25[1], folder / "other.gguf")
    assert find_files(folder).missing.startswith("no projector file fits one.gguf in its folder, not other.gguf, and")


def test_the_model_in_the_package_has_its_own_type_whatever_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "BF16")
    found = find_files("demo")
    assert found.projector is not None
    assert found.missing is None or "BF16" not in found.missing
    with pytest.raises(ModelFileError, match="is part of the package, where nothing is written: copy both files"):
        find_files("demo", mmproj_type="BF16")
