"""A projector file in another type: what changes, what stays, where it is used, and what is refused."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

import gguf_maker
import lookonce
from lookonce import gguf_file, retype
from lookonce.errors import InputError, MismatchError, ModelFileError
from lookonce.fingerprint import hash_files
from lookonce.model_files import find_files
from lookonce.projector_choice import compare
from lookonce.store import Store
from lookonce.synthetic.pair import make_pair

Pair = tuple[Path, Path]


@pytest.fixture(scope="module", params=["qwen3vl", "qwen2.5vl"])
def f16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("f16"), family=request.param, mmproj_type="F16")[1]


@pytest.fixture
def original(f16: Path, tmp_path: Path) -> Path:
    return shutil.copy(f16, tmp_path / "mmproj-F16.gguf")


@pytest.fixture
def model(tmp_path: Path, tiny_pair: Pair) -> Path:
    """A folder with a text model and an F32 projector."""
    shutil.copy(tiny_pair[0], tmp_path / "text.gguf")
    shutil.copy(tiny_pair[1], tmp_path / "mmproj.gguf")
    return tmp_path


# --- what is written


@pytest.mark.parametrize("type_", ["BF16", "Q8_0"])
def test_matrices_become_what_the_gguf_library_makes_of_them_and_the_rest_stays(original: Path, type_: str) -> None:
    made = retype.retype(original, type_)
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(original).tensors}
    after = gguf.GGUFReader(made.path).tensors
    assert [tensor.name for tensor in after] == list(before)
    changed = 0
    for tensor in after:
        old = before[tensor.name]
        values = gguf.quants.dequantize(old.data, old.tensor_type)
        assert tensor.shape.tolist() == old.shape.tolist()
        if "patch_embd.weight" in tensor.name:
            assert (old.tensor_type, tensor.tensor_type) == (Q.F16, Q.F32)
            assert np.array_equal(tensor.data, values)
        elif len(tensor.shape) == 1 or "position_embd" in tensor.name:
            assert (old.tensor_type, tensor.tensor_type) == (Q.F32, Q.F32)
            assert np.array_equal(tensor.data, old.data)
        elif type_ == "Q8_0" and tensor.shape[0] % 32:
            assert tensor.tensor_type == Q.F16
            assert np.array_equal(tensor.data, old.data)
        else:
            assert tensor.tensor_type == Q[type_]
            assert np.array_equal(tensor.data, gguf.quants.quantize(values, Q[type_]))
            changed += 1
    assert changed > 10


def test_a_file_of_random_weights_and_one_retyped_to_its_type_have_the_same_tensors(tmp_path: Path) -> None:
    whole = make_pair(tmp_path / "whole")[1]
    for type_ in retype.TYPES:
        made = retype.retype(whole, type_).path
        written = make_pair(tmp_path / type_, mmproj_type=type_)[1]
        for ours, theirs in zip(gguf.GGUFReader(made).tensors, gguf.GGUFReader(written).tensors, strict=True):
            assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
            assert np.array_equal(ours.data, theirs.data), ours.name


def test_metadata_stay_in_their_order_but_for_the_type_and_the_origin(original: Path) -> None:
    made = gguf.GGUFReader(retype.retype(original, "BF16").path)
    before = gguf.GGUFReader(original)
    assert list(made.fields) == [*before.fields, "lookonce.retyped_from"]
    for name, field in before.fields.items():
        new = made.fields[name]
        if name == "general.file_type":
            assert new.contents() == gguf.LlamaFileType.MOSTLY_BF16
        elif name != "GGUF.kv_count":
            assert (new.types, new.contents()) == (field.types, field.contents()), name


def test_odd_metadata_and_alignment_are_copied_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf.gguf_writer.GGUF_DEFAULT_ALIGNMENT", 128)
    keys = {
        "general.alignment": gguf_maker.u32(128),
        "odd.text": (gguf.GGUFValueType.STRING, "a\x00b \N{SNOWMAN}"),
        "odd.texts": gguf_maker.array(gguf.GGUFValueType.STRING, ["", "x" * 300]),
        "odd.number": (gguf.GGUFValueType.FLOAT64, 0.1),
    }
    source = gguf_maker.write_projector(tmp_path / "odd.gguf", keys=keys)
    made = gguf_file.read(retype.retype(source, "BF16").path)
    before = gguf_file.read(source)
    assert made.alignment == 128
    for name in keys:
        assert (made.metadata[name], made.types[name]) == (before.metadata[name], before.types[name])
    assert all(info.offset % 128 == 0 for info in made.tensors.values())


@pytest.mark.parametrize("type_", ["BF16", "Q8_0"])
def test_the_rows_of_a_picture_stay_nearly_the_same(original: Path, type_: str) -> None:
    cosine = compare(original, retype.retype(original, type_).path, threads=1)
    assert 0.999 <= cosine < 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mmproj-Qwen3VL-2B-Instruct-F16.gguf", "mmproj-Qwen3VL-2B-Instruct-BF16.gguf"),
        ("mmproj-Qwen.Qwen3-VL-Embedding-2B.f16.gguf", "mmproj-Qwen.Qwen3-VL-Embedding-2B.bf16.gguf"),
        ("Qwen3-VL-Embedding-8B.mmproj-f16.gguf", "Qwen3-VL-Embedding-8B.mmproj-bf16.gguf"),
        ("mmproj-Qwen3VL-2B-Instruct-Q8_0.gguf", "mmproj-Qwen3VL-2B-Instruct-BF16.gguf"),
        ("mmproj-Q4_K_M-F32.gguf", "mmproj-Q4_K_M-BF16.gguf"),
        ("mmproj.gguf", "mmproj-BF16.gguf"),
        ("mmproj-f160.gguf", "mmproj-f160-BF16.gguf"),
    ],
)
def test_the_type_in_the_name_is_replaced_or_added(name: str, expected: str) -> None:
    assert retype.retyped_name(Path("folder") / name, "BF16") == Path("folder") / expected


def test_the_same_again_is_found_and_another_file_of_that_name_is_not_touched(original: Path) -> None:
    first = retype.retype(original, "bf16")
    assert not first.existed
    time_ns = first.path.stat().st_mtime_ns
    again = retype.retype(original, "BF16")
    assert (again.existed, again.path, again.path.stat().st_mtime_ns) == (True, first.path, time_ns)
    for other in (b"my notes", original.read_bytes()):
        first.path.write_bytes(other)
        with pytest.raises(InputError, match=r"mmproj-BF16\.gguf exists and was not retyped from mmproj-F16\.gguf"):
            retype.retype(original, "BF16")
        assert first.path.read_bytes() == other


def test_a_progress_report_ends_at_the_whole(original: Path) -> None:
    told: list[tuple[int, int]] = []
    retype.retype(original, "BF16", advance=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 1_000_000


# --- what is refused


def test_a_text_model_a_retyped_file_and_an_unknown_type_are_refused(original: Path, tiny_pair: Pair) -> None:
    with pytest.raises(ModelFileError, match=r"is a text model .* but a projector file"):
        retype.retype(tiny_pair[0], "BF16")
    with pytest.raises(InputError, match=r"'Q4_0' is no type .* choose one of BF16, F16, Q8_0$"):
        retype.retype(original, "Q4_0")
    with pytest.raises(InputError, match="is F16 already"):
        retype.retype(original, "F16")
    made = retype.retype(original, "BF16")
    with pytest.raises(ModelFileError, match="was itself retyped from another file: give the original"):
        retype.retype(made.path, "Q8_0")
    with pytest.raises(ModelFileError, match=r"nothing\.gguf does not exist"):
        retype.retype(original.with_name("nothing.gguf"), "BF16")


def test_a_projector_of_another_family_is_refused(tmp_path: Path) -> None:
    keys = {"clip.projector_type": (gguf.GGUFValueType.STRING, "gemma3")}
    other = gguf_maker.write_projector(tmp_path / "gemma.gguf", keys=keys)
    with pytest.raises(ModelFileError, match="of the family 'gemma3': only qwen3vl"):
        retype.retype(other, "BF16")


@pytest.mark.parametrize(("value", "told"), [(1e5, "values to 1e\\+05 .* beyond what F16 holds"), (np.nan, "finite")])
def test_a_value_that_the_type_cannot_hold_is_refused_and_leaves_nothing(
    tiny_pair: Pair, tmp_path: Path, value: float, told: str
) -> None:
    source = shutil.copy(tiny_pair[1], tmp_path / "mmproj.gguf")
    info = gguf_file.read(source).tensors["mm.2.weight"]
    with source.open("r+b") as file:
        file.seek(info.offset + 4000)
        file.write(np.float32(value).tobytes())
    with pytest.raises(InputError, match=told):
        retype.retype(source, "F16")
    assert [path.name for path in tmp_path.iterdir()] == ["mmproj.gguf"]


def test_a_source_changed_while_it_is_read_is_refused(original: Path) -> None:
    def change(done: int, total: int) -> None:
        os.utime(original, (1e9, 1e9))

    with pytest.raises(ModelFileError, match="was changed while it was read"):
        retype.retype(original, "BF16", advance=change)
    assert [path.name for path in original.parent.iterdir()] == [original.name]


def test_a_folder_that_cannot_be_written_to_is_told_in_one_sentence(original: Path) -> None:
    code = "import sys; from lookonce.retype import retype; retype(sys.argv[1], 'BF16')"
    found = subprocess.run(
        [sys.executable, "-c", code, str(original)], capture_output=True, text=True, check=False, preexec_fn=_no_space
    )
    assert found.stderr.splitlines()[-1].startswith("lookonce.errors.InputError: ")
    assert found.stderr.splitlines()[-1].endswith(
        "mmproj-BF16.gguf cannot be written (File too large): make room there"
    )
    assert [path.name for path in original.parent.iterdir()] == [original.name]


def _no_space() -> None:
    """Let no file grow beyond a megabyte: the write fails half way, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_disk_without_room_is_refused_before_any_work(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(original)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs .*MB, but .* are free on its disk: make room there"):
        retype.retype(original, "BF16")


def test_a_run_killed_while_it_writes_leaves_no_file_of_the_name_and_the_next_one_clears_up(original: Path) -> None:
    code = (
        "import os, sys; from lookonce.retype import retype; "
        "retype(sys.argv[1], 'BF16', advance=lambda done, total: done > total / 2 and os.kill(os.getpid(), 9))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(original)], capture_output=True, check=False)
    assert found.returncode == -signal.SIGKILL
    assert not list(original.parent.glob("mmproj-BF16*"))
    assert len(list(original.parent.glob(".*.part"))) == 1
    retype.retype(original, "BF16")
    assert sorted(path.name for path in original.parent.iterdir()) == ["mmproj-BF16.gguf", "mmproj-F16.gguf"]


# --- where it is used


def test_a_retyped_file_is_passed_over_until_it_is_asked_for(model: Path) -> None:
    original = model / "mmproj.gguf"
    made = retype.retype(original, "BF16").path

    def found(**options: Any) -> str:
        projector = find_files(model, **options).projector
        assert projector is not None
        return projector.path.name

    assert found() == "mmproj.gguf"
    assert found(mmproj_type="BF16") == found(mmproj_type="bf16") == found(mmproj_type="auto") == made.name
    assert found(mmproj=original, mmproj_type="BF16") == made.name
    assert found(mmproj=made) == made.name
    newest = retype.retype(original, "Q8_0").path
    os.utime(newest, (time.time() + 10,) * 2)
    assert found() == "mmproj.gguf"
    assert found(mmproj_type="auto") == newest.name
    assert found(mmproj_type="BF16") == made.name


def test_auto_without_a_retyped_file_is_the_original(model: Path) -> None:
    projector = find_files(model, mmproj_type="auto").projector
    assert projector is not None
    assert projector.path.name == "mmproj.gguf"


def test_a_type_that_nobody_made_is_refused_with_the_command_that_makes_it(model: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no BF16 file beside it: make one with") as caught:
        find_files(model, mmproj_type="BF16")
    command = str(caught.value).partition("`")[2].rstrip("`")
    assert command == f"lookonce models retype {model / 'mmproj.gguf'} --type BF16"
    with pytest.raises(InputError, match="'F64' is no type of a projector here"):
        find_files(model, mmproj_type="F64")


@pytest.mark.parametrize("who", ["LOOKONCE_MMPROJ_TYPE", "the model's card"])
def test_a_type_that_nobody_made_and_that_no_option_names_stops_pictures_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    options: dict[str, Any] = {"threads": 1, "n_ctx": 256, "store": False}
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    named: str | Path = model
    with lookonce.load(model, **options) as loaded:
        loaded.look(picture).save(tmp_path / "look.safetensors")
    if who == "LOOKONCE_MMPROJ_TYPE":
        monkeypatch.setenv(who, "bf16")
    else:
        named = "own"
        write_card(model, tmp_path, monkeypatch, "BF16")
    with lookonce.load(named, **options) as loaded:
        assert loaded.ask("What?", temperature=0, max_tokens=2).usage.generated == 2
        assert loaded.ask("What?", [tmp_path / "look.safetensors"], max_tokens=2).usage.image_rows > 0
        with pytest.raises(ModelFileError) as caught:
            loaded.ask("What?", [picture])
    told = str(caught.value)
    assert told.startswith(f"{who} asks for the projector in BF16, but {model / 'mmproj.gguf'} has no BF16 file beside")
    assert f"make one with `lookonce models retype {model / 'mmproj.gguf'} --type BF16`, or " in told
    with pytest.raises(ModelFileError, match="has no Q8_0 file beside it"):
        lookonce.load(named, mmproj_type="Q8_0", **options)
    retype.retype(model / "mmproj.gguf", "BF16")
    with lookonce.load(named, **options) as loaded:
        assert loaded.look(picture).projector_name == "mmproj-BF16.gguf"


def test_what_is_wrong_with_a_file_of_the_type_that_the_environment_asks_for_is_told_at_once(
    model: Path, tiny_pair_25: Pair, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copy(tiny_pair_25[1], tmp_path_factory.mktemp("25") / "mmproj.gguf")
    data = retype.retype(other, "BF16").path.read_bytes()
    origins = [hash_files([path]).encode() for path in (other, model / "mmproj.gguf")]
    (model / "mmproj-BF16.gguf").write_bytes(data.replace(*origins))
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "BF16")
    with pytest.raises(ModelFileError, match=r"mmproj-BF16\.gguf is a projector for qwen2.5vl, but .*text\.gguf is"):
        find_files(model)


def test_a_named_projector_that_is_not_of_that_type_still_refuses_looks_of_another(
    model: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"threads": 1, "n_ctx": 256, "store": False}
    other = make_pair(tmp_path_factory.mktemp("other"), seed=1)[1]
    for name, projector in (("own", model / "mmproj.gguf"), ("other", other)):
        with lookonce.load(model, mmproj=projector, **options) as loaded:
            loaded.look(np.zeros((64, 64, 3), dtype=np.uint8)).save(model / f"{name}.safetensors")
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "BF16")
    with lookonce.load(model, mmproj=model / "mmproj.gguf", **options) as loaded:
        assert loaded.look(model / "own.safetensors").projector_name == "mmproj.gguf"
        with pytest.raises(MismatchError, match=r"made with the projector .*, but the model has mmproj\.gguf"):
            loaded.look(model / "other.safetensors")
    with lookonce.load(model, **options) as loaded:  # one that nobody named takes both
        assert loaded.look(model / "other.safetensors").projector_name == other.name


def test_a_variable_that_names_no_type_is_refused_by_its_name_and_an_option_outranks_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "F64")
    with pytest.raises(
        InputError, match=r"^LOOKONCE_MMPROJ_TYPE is 'F64': set it to BF16, F16, Q8_0 or auto, or unset"
    ):
        lookonce.load(model, store=False)
    assert find_files(model, mmproj_type="auto").projector is not None


def test_a_file_retyped_from_what_the_original_was_before_is_not_used(model: Path, tmp_path_factory: Any) -> None:
    original = model / "mmproj.gguf"
    retype.retype(original, "BF16")
    shutil.copy(make_pair(tmp_path_factory.mktemp("other"), seed=1)[1], original)
    with pytest.raises(ModelFileError, match=r"mmproj-BF16\.gguf was made from another file: delete it"):
        find_files(model, mmproj_type="BF16")
    projector = find_files(model, mmproj_type="auto").projector
    assert projector is not None
    assert projector.path == original


def test_without_its_original_a_retyped_file_is_named_in_the_reason(model: Path) -> None:
    retype.retype(model / "mmproj.gguf", "BF16")
    (model / "mmproj.gguf").unlink()
    files = find_files(model)
    assert files.projector is None
    assert "what was retyped from one that is gone (mmproj-BF16.gguf)" in files.missing


def test_the_type_asked_for_decides_between_originals(model: Path, tiny_pair: Pair) -> None:
    shutil.copy(make_pair(model / "f16", mmproj_type="F16")[1], model / "other.gguf")
    assert find_files(model).projector is None
    projector = find_files(model, mmproj_type="F16").projector
    assert projector is not None
    assert projector.path.name == "other.gguf"


def write_card(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    card = (
        f'[own]\nfamily = "qwen3vl"\nlicence = "MIT"\nfolder = {str(model)!r}\nmmproj_type = "{kind}"\n'
        'text.F32 = { file = "text.gguf" }\nprojector.F32 = { file = "mmproj.gguf" }\n'
    )
    (tmp_path / "models.toml").write_text(card)
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "models.toml"))


def test_a_card_can_say_which_type_is_used(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retype.retype(model / "mmproj.gguf", "BF16")
    write_card(model, tmp_path, monkeypatch, "auto")
    projector = find_files("own").projector
    assert projector is not None
    assert projector.path.name == "mmproj-BF16.gguf"
    with pytest.raises(ModelFileError, match="has no Q8_0 file"):
        find_files("own", mmproj_type="Q8_0")


def test_a_look_by_one_type_is_a_miss_for_the_other_and_both_are_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retype.retype(model / "mmproj.gguf", "BF16")
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    options: dict[str, Any] = {"threads": 1, "n_ctx": 256, "store": tmp_path / "store"}
    keys = []
    for expected in ("encoded", "store"):
        for kind in ("", "BF16"):
            monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", kind)
            with lookonce.load(model, **options) as loaded:
                look = loaded.look(picture)
            assert look.source == expected
            keys.append((look.key, look.projector_name))
    assert keys[:2] == keys[2:]
    assert keys[0] != keys[1]
    with Store(tmp_path / "store") as store:
        assert len(list(store.entries())) == 2


def test_a_saved_look_of_the_original_is_read_by_a_model_with_the_retyped_file(model: Path, tmp_path: Path) -> None:
    retype.retype(model / "mmproj.gguf", "BF16")
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    options: dict[str, Any] = {"threads": 1, "n_ctx": 256, "store": False}
    with lookonce.load(model, **options) as loaded:
        loaded.look(picture).save(tmp_path / "look.safetensors")
    with lookonce.load(model, mmproj_type="BF16", **options) as loaded:
        assert loaded.look(tmp_path / "look.safetensors").projector_name == "mmproj.gguf"
