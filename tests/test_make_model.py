"""The model maker: what it writes is what llama.cpp's converter writes, and it behaves like a model."""

import math
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

import lookonce

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import make_model
from lookonce.synthetic.pair import TEXT_TYPES, make_pair, make_weights
from lookonce.synthetic.shape import FAMILIES, find_shape, shape_names
from lookonce.synthetic.vocabulary import build_vocabulary
from lookonce.synthetic.weight import Weights
from parity_picture import make_picture

BOTH = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {family: make_pair(tmp_path_factory.mktemp("pair"), family=family) for family in FAMILIES}


@BOTH
def test_a_tiny_pair_is_made_within_two_seconds_of_processor_time(family: str, tmp_path: Path) -> None:
    before = time.process_time()
    make_pair(tmp_path, family=family)
    assert time.process_time() - before < 2


@BOTH
def test_the_same_arguments_give_the_same_bytes(
    family: str, tmp_path: Path, pairs: dict[str, tuple[Path, Path]]
) -> None:
    for first, again in zip(pairs[family], make_pair(tmp_path, family=family), strict=True):
        assert first.name == again.name
        assert first.read_bytes() == again.read_bytes()


@BOTH
def test_another_seed_gives_other_weights_in_both_files(
    family: str, tmp_path: Path, pairs: dict[str, tuple[Path, Path]]
) -> None:
    for first, other in zip(pairs[family], make_pair(tmp_path, family=family, seed=1), strict=True):
        for ours, theirs in zip(gguf.GGUFReader(first).tensors, gguf.GGUFReader(other).tensors, strict=True):
            assert not np.array_equal(ours.data, theirs.data), ours.name


def test_a_seed_gives_these_very_weights_with_any_numpy() -> None:
    weights, _ = make_weights(find_shape("qwen3vl", "tiny"))
    values = weights["model.language_model.layers.1.self_attn.q_proj.weight"]
    assert values.dtype == np.float32
    assert values[0, :3].tolist() == pytest.approx([-0.135604545, -0.014337732, 0.029354688], abs=1e-8)


@BOTH
def test_every_weight_stands_under_the_name_that_the_gguf_library_maps_it_to(
    family: str, pairs: dict[str, tuple[Path, Path]]
) -> None:
    shape = find_shape(family, "tiny")
    weights, _ = make_weights(shape)
    text_arch = gguf.MODEL_ARCH.QWEN3VL if family == "qwen3vl" else gguf.MODEL_ARCH.QWEN2VL
    checked = 0
    for path, arch, layers in (
        (pairs[family][0], text_arch, shape.text.layers),
        (pairs[family][1], gguf.MODEL_ARCH.MMPROJ, shape.vision.depth),
    ):
        names = gguf.get_tensor_name_map(arch, layers)
        stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for key in weights:
            name = names.get_name(key.replace("model.visual.", "visual."), try_suffixes=(".weight", ".bias"))
            name = name or names.get_name(key.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))
            if name in stored and stored[name].size == weights[key].size:
                assert np.array_equal(stored[name].reshape(-1), weights[key].reshape(-1)), key
                checked += 1
    # The rest are split or renumbered, and compared one by one below.
    assert checked >= len(weights) - {"qwen3vl": 20, "qwen2.5vl": 12}[family]


def test_the_projector_splits_and_names_tensors_as_the_converter_does(pairs: dict[str, tuple[Path, Path]]) -> None:
    three = {tensor.name: tensor for tensor in gguf.GGUFReader(pairs["qwen3vl"][1]).tensors}
    weights, _ = make_weights(find_shape("qwen3vl", "tiny"))
    patch = weights["model.visual.patch_embed.proj.weight"]
    assert np.array_equal(three["v.patch_embd.weight"].data, patch[:, :, 0])
    assert np.array_equal(three["v.patch_embd.weight.1"].data, patch[:, :, 1])
    merger = weights["model.visual.deepstack_merger_list.1.linear_fc1.weight"]
    assert np.array_equal(three["v.deepstack.2.fc1.weight"].data, merger)
    two = {tensor.name: tensor for tensor in gguf.GGUFReader(pairs["qwen2.5vl"][1]).tensors}
    weights, _ = make_weights(find_shape("qwen2.5vl", "tiny"))
    whole = weights["model.visual.blocks.3.attn.qkv.weight"]
    parts = [two[f"v.blk.3.attn_{letter}.weight"].data for letter in "qkv"]
    assert np.array_equal(np.concatenate(parts), whole)


@BOTH
def test_the_names_in_the_metadata_tell_family_shape_and_seed(family: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    for path, kind in zip(pairs[family], ("model", "mmproj"), strict=True):
        reader = gguf.GGUFReader(path)
        name, type_ = reader.get_field("general.name"), reader.get_field("general.type")
        assert name is not None
        assert type_ is not None
        assert name.contents() == f"{FAMILIES[family]} tiny seed 0"
        assert type_.contents() == kind


@pytest.mark.parametrize(
    ("shape", "size_bytes"),
    [("2b", 819_395_136), ("8b", 1_159_029_824)],
)
def test_a_projector_in_f16_has_the_size_of_the_published_file(shape: str, size_bytes: int) -> None:
    weights, _ = make_weights(find_shape("qwen3vl", shape))
    shapes = [(key, weights.shape_of(key)) for key in weights if key.startswith("model.visual.")]
    stays_f32 = [len(size) == 1 or "pos_embed" in key for key, size in shapes]
    total = sum(math.prod(size) * (4 if f32 else 2) for (_, size), f32 in zip(shapes, stays_f32, strict=True))
    assert abs(total - size_bytes) < 40_000


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_large_vocabulary_gives_special_tokens_their_official_ids(family: str) -> None:
    vocabulary = build_vocabulary(family, 151_936)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == 151_936
    official = {"<|endoftext|>": 151_643, "<|im_end|>": 151_645, "<|vision_start|>": 151_652, "<|image_pad|>": 151_655}
    assert {token: vocabulary.id_of(token) for token in official} == official


@BOTH
@pytest.mark.parametrize("type_", TEXT_TYPES)
def test_every_type_loads_and_answers(family: str, type_: str, tmp_path: Path) -> None:
    mmproj_type = "Q8_0" if type_ == "Q4_K_M" else type_
    text, projector = make_pair(tmp_path, family=family, type=type_, mmproj_type=mmproj_type)
    with lookonce.load(text, mmproj=projector, store=False, threads=1) as model:
        assert model.ask("What is it?", [make_picture(96, 64)], temperature=0, max_tokens=4).text


@BOTH
def test_answers_are_readable_vary_and_depend_on_the_picture(family: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    text, projector = pairs[family]
    with lookonce.load(text, mmproj=projector, store=False, threads=1) as model:
        pictures = [[make_picture(96, 64, number)] for number in range(3)]
        answers = [model.ask("What is it?", one, temperature=0, max_tokens=24).text for one in ([], *pictures)]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) > 8 and "\N{REPLACEMENT CHARACTER}" not in answer for answer in answers)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, projector = make_pair(tmp_path)
    before = projector.read_bytes()

    def fail(self: Weights, name: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Weights, "__getitem__", fail)
    with pytest.raises(OSError, match="no space left"):
        make_pair(tmp_path, seed=0)
    assert {path.name for path in tmp_path.iterdir()} == {text.name, projector.name}
    assert projector.read_bytes() == before


def test_an_unknown_shape_or_type_is_named_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'3b'.*qwen3vl 2b"):
        make_pair(tmp_path, shape="3b")
    with pytest.raises(ValueError, match=r"'Q2_K'.*Q4_K_M"):
        make_pair(tmp_path, type="Q2_K")
    with pytest.raises(ValueError, match=r"'Q4_K_M'.*Q8_0"):
        make_pair(tmp_path, mmproj_type="Q4_K_M")
    assert shape_names("qwen2.5vl") == ("tiny", "3b", "7b")


def test_the_command_line_prints_the_two_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_model.main([str(tmp_path / "new"), "--family", "qwen2.5vl", "--seed", "7"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.exists() for path in paths] == [True, True]
    assert make_model.main([str(tmp_path), "--shape", "9b"]) == 2
    assert capsys.readouterr().err.startswith("make_model: there is no shape '9b'")
