"""What llama.cpp would abort on is refused, what it loads is not, and two files that do not fit are told apart."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gguf_maker as maker
from gguf_maker import Q, T, array, f32, u32
from lookonce import gguf_check, gguf_file
from lookonce.errors import ModelFileError

TEXT_FAMILIES = ("qwen2vl", "qwen3vl", "qwen3vlmoe")
FAMILIES = ("qwen2vl", "qwen2.5vl", "qwen3vl")
NAN, INF = float("nan"), float("inf")


def refusal(check: Callable[..., None], *paths: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        check(*map(gguf_file.read, paths))
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(path) in message for path in paths)
    return message


@pytest.mark.parametrize("arch", TEXT_FAMILIES)
def test_a_sound_text_model_passes(tmp_path: Path, arch: str) -> None:
    gguf_check.check_text_model(gguf_file.read(maker.write_text(tmp_path / "a.gguf", arch)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_projector_passes_and_its_family_is_named(tmp_path: Path, family: str) -> None:
    read = gguf_file.read(maker.write_projector(tmp_path / "a.gguf", family))
    gguf_check.check_projector(read)
    assert gguf_check.family(read) == family


def test_the_pairs_that_the_model_maker_writes_pass(
    tiny_pair: tuple[Path, Path], tiny_pair_25: tuple[Path, Path]
) -> None:
    for paths in (tiny_pair, tiny_pair_25):
        text, projector = map(gguf_file.read, paths)
        gguf_check.check_text_model(text)
        gguf_check.check_projector(projector)
        gguf_check.check_pair(text, projector)


def test_each_kind_of_file_in_the_place_of_the_other_is_named(tmp_path: Path) -> None:
    text, projector = maker.write_text(tmp_path / "a.gguf"), maker.write_projector(tmp_path / "b.gguf")
    assert refusal(gguf_check.check_text_model, projector) == (
        f"{projector} is a projector file (mmproj), but a text model was expected: give it as mmproj= / --mmproj"
    )
    assert refusal(gguf_check.check_projector, text) == (
        f"{text} is a text model (qwen3vl), but a projector file (mmproj) was expected: give it as model= / --model"
    )


def test_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    adapter = maker.write(
        tmp_path / "a.gguf", {"general.architecture": (T.STRING, "qwen3vl"), "general.type": (T.STRING, "adapter")}, {}
    )
    assert "qwen3vl adapter without token_embd.weight" in refusal(gguf_check.check_text_model, adapter)
    empty = maker.write(tmp_path / "b.gguf", {}, {})
    assert "general.architecture" in refusal(gguf_check.check_text_model, empty)
    assert "no architecture" in refusal(gguf_check.check_projector, empty)


def test_another_architecture_passes_with_what_every_model_has(tmp_path: Path) -> None:
    keys = {
        "general.architecture": (T.STRING, "gemma9"),
        "gemma9.block_count": u32(3),
        "gemma9.embedding_length": u32(8),
        "gemma9.context_length": u32(512),
        "tokenizer.ggml.model": (T.STRING, "llama"),
        "tokenizer.ggml.tokens": array(T.STRING, ["a", "b"]),
    }
    tensors = {"token_embd.weight": ((8, 2), Q.F16)}
    read = gguf_file.read(maker.write(tmp_path / "a.gguf", keys, tensors))
    gguf_check.check_text_model(read)
    assert gguf_check.input_width(read) == 8
    for key in keys:
        lacking = {name: value for name, value in keys.items() if name != key}
        path = maker.write(tmp_path / "b.gguf", lacking, tensors)
        if key != "gemma9.embedding_length":
            refusal(gguf_check.check_text_model, path)
    path = maker.write(tmp_path / "c.gguf", keys | {"gemma9.nextn_predict_layers": u32(4)}, tensors)
    assert "nextn_predict_layers" in refusal(gguf_check.check_text_model, path)


def test_another_projector_passes_and_its_type_is_its_family(tmp_path: Path) -> None:
    keys = {
        "general.architecture": (T.STRING, "clip"),
        "clip.has_vision_encoder": (T.BOOL, True),
        "clip.vision.projector_type": (T.STRING, "gemma9"),
        "clip.vision.block_count": u32(3),
    }
    read = gguf_file.read(maker.write(tmp_path / "a.gguf", keys, {}))
    gguf_check.check_projector(read)
    assert gguf_check.family(read) == "gemma9"
    gguf_check.check_pair(gguf_file.read(maker.write_text(tmp_path / "b.gguf")), read)
    path = maker.write(tmp_path / "c.gguf", keys | {"clip.vision.block_count": u32(1 << 30)}, {})
    assert "block_count" in refusal(gguf_check.check_projector, path)


# llama.cpp asserts, divides by or multiplies with each of these; the comment says where.
TEXT_KEYS: list[tuple[str, str, Any]] = [
    ("qwen3vl", "block_count", ()),
    ("qwen3vl", "block_count", u32(0)),  # load_hparams
    ("qwen3vl", "block_count", u32(1)),  # blk.1 is left over
    ("qwen3vl", "block_count", u32(3)),
    ("qwen3vl", "block_count", u32(513)),  # load_hparams
    ("qwen3vl", "block_count", (T.INT32, 2)),
    ("qwen3vl", "context_length", ()),
    ("qwen3vl", "context_length", u32(0)),
    ("qwen3vl", "context_length", u32(1 << 31)),
    ("qwen3vl", "embedding_length", ()),
    ("qwen3vl", "embedding_length", u32(31)),
    ("qwen3vl", "embedding_length", u32(0)),
    ("qwen3vl", "embedding_length", (T.STRING, "32")),
    ("qwen3vl", "embedding_length_out", u32(64)),  # llama_context reads past the embeddings
    ("qwen3vl", "feed_forward_length", ()),
    ("qwen3vl", "feed_forward_length", u32(47)),
    ("qwen3vl", "attention.head_count", ()),
    ("qwen3vl", "attention.head_count", u32(0)),
    ("qwen3vl", "attention.head_count", u32(3)),
    ("qwen3vl", "attention.head_count", array(T.UINT32, [2, 2])),
    ("qwen3vl", "attention.head_count_kv", u32(0)),
    ("qwen3vl", "attention.head_count_kv", u32(2)),
    ("qwen3vl", "attention.key_length", u32(8)),
    ("qwen3vl", "attention.value_length", u32(8)),  # the graph's n_embd_head assertion
    ("qwen3vl", "rope.dimension_count", u32(8)),  # the graph's n_rot assertion
    ("qwen3vl", "rope.dimension_sections", ()),
    ("qwen3vl", "rope.dimension_sections", array(T.INT32, [0, 0, 0, 0])),  # ggml_rope_multi
    ("qwen3vl", "rope.dimension_sections", array(T.INT32, [4, 2, 2])),
    ("qwen3vl", "rope.dimension_sections", array(T.INT32, [4, 2, 1, 0])),
    ("qwen3vl", "rope.dimension_sections", array(T.INT32, [9, -1, 0, 0])),
    ("qwen3vl", "rope.dimension_sections", array(T.FLOAT32, [4.0, 2.0, 2.0, 0.0])),
    ("qwen3vl", "rope.freq_base", f32(0.0)),
    ("qwen3vl", "rope.freq_base", f32(INF)),
    ("qwen3vl", "rope.scaling.factor", f32(NAN)),
    ("qwen3vl", "rope.scaling.type", (T.STRING, "spiral")),  # load_hparams
    ("qwen3vl", "attention.layer_norm_rms_epsilon", ()),
    ("qwen3vl", "attention.layer_norm_rms_epsilon", f32(-1.0)),  # ggml_rms_norm
    ("qwen3vl", "attention.layer_norm_rms_epsilon", f32(NAN)),
    ("qwen3vl", "attention.layer_norm_rms_epsilon", (T.FLOAT64, 1e-6)),
    ("qwen3vl", "attention.causal", (T.BOOL, False)),  # llama_decode asserts one batch
    ("qwen3vl", "pooling_type", u32(7)),  # llama_context
    ("qwen3vl", "nextn_predict_layers", u32(3)),  # load_hparams
    ("qwen3vl", "nextn_predict_layers", u32(2)),
    ("qwen3vl", "n_deepstack_layers", u32(3)),
    ("qwen3vl", "expert_count", u32(1025)),  # load_hparams, and so the next ones
    ("qwen3vl", "expert_count", u32(4)),
    ("qwen3vl", "expert_used_count", u32(1)),
    ("qwen3vl", "expert_used_count", array(T.UINT32, [0, 1])),
    ("qwen3vl", "expert_group_count", u32(1)),
    ("qwen2vl", "n_deepstack_layers", u32(1)),
    ("qwen2vl", "attention.key_length", u32(8)),
    ("qwen3vlmoe", "expert_count", u32(8)),
    ("qwen3vlmoe", "expert_used_count", u32(0)),
    ("qwen3vlmoe", "expert_used_count", u32(5)),
    ("qwen3vlmoe", "expert_group_count", u32(4)),
    ("qwen3vlmoe", "expert_group_count", u32(3)),
    ("qwen3vlmoe", "expert_feed_forward_length", u32(9)),
    ("qwen3vlmoe", "expert_feed_forward_length", ()),
]


@pytest.mark.parametrize(("arch", "key", "value"), TEXT_KEYS)
def test_a_text_model_with_a_wrong_hyperparameter_is_refused(
    tmp_path: Path, arch: str, key: str, value: tuple[Any, ...]
) -> None:
    refusal(gguf_check.check_text_model, maker.write_text(tmp_path / "a.gguf", arch, keys={f"{arch}.{key}": value}))


def test_a_hyperparameter_that_has_a_default_may_be_missing(tmp_path: Path) -> None:
    absent = ("key_length", "value_length")
    keys: maker.Keys = {f"qwen3vl.attention.{key}": () for key in absent} | {"qwen3vl.rope.freq_base": ()}
    gguf_check.check_text_model(gguf_file.read(maker.write_text(tmp_path / "a.gguf", keys=keys)))


VOCABULARIES: list[tuple[str, Any, str]] = [
    ("model", (), "no vocabulary"),
    ("model", (T.STRING, "llama"), "other than gpt2"),
    ("tokens", (), "tokenizer.ggml.tokens"),
    ("tokens", (T.STRING, "a"), "not [str]"),
    ("tokens", array(T.INT32, [1] * maker.TOKENS), "not [str]"),
    ("tokens", array(T.STRING, [f"t{i}" for i in range(39)]), "39 tokens"),
    ("tokens", array(T.STRING, [f"t{i % 39}" for i in range(40)]), "twice"),  # llama_vocab::impl::load
    ("tokens", array(T.STRING, ["", "[EMPTY_0]", *(f"t{i}" for i in range(38))]), "twice"),
    ("token_type", array(T.INT32, [1] * 39), "39 entries"),
    ("token_type", array(T.UINT32, [1] * 40), "not [i32]"),
    ("scores", array(T.FLOAT32, [1.0] * 39), "39 entries"),
    ("scores", array(T.STRING, ["1"] * 40), "not [f32] or [i32]"),
    ("merges", (), "tokenizer.ggml.merges"),
    ("merges", array(T.INT32, [1]), "not [str]"),
]


@pytest.mark.parametrize(("key", "value", "words"), VOCABULARIES)
def test_a_text_model_with_a_wrong_vocabulary_is_refused(
    tmp_path: Path, key: str, value: tuple[Any, ...], words: str
) -> None:
    path = maker.write_text(tmp_path / "a.gguf", keys={f"tokenizer.ggml.{key}": value})
    message = refusal(gguf_check.check_text_model, path)
    assert words in message or ("39" in words and "(32, 40), not (32, 39)" in message) or "for 39 tokens" in message


def test_a_vocabulary_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = maker.write_text(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes().replace(b"t39", b"t\xc39"))
    assert "not UTF-8" in refusal(gguf_check.check_text_model, path)


def test_empty_tokens_stand_for_their_numbers(tmp_path: Path) -> None:
    tokens = ["", "", *(f"t{i}" for i in range(38))]
    path = maker.write_text(tmp_path / "a.gguf", keys={"tokenizer.ggml.tokens": array(T.STRING, tokens)})
    gguf_check.check_text_model(gguf_file.read(path))


@pytest.mark.parametrize("arch", TEXT_FAMILIES)
def test_a_text_model_without_a_tensor_or_with_another_shape_or_type_is_refused(tmp_path: Path, arch: str) -> None:
    for name, (shape, _) in maker.text_tensors(arch).items():
        optional = name.endswith(".bias")
        if not optional:
            path = maker.write_text(tmp_path / "a.gguf", arch, tensors={name: ()})  # type: ignore[dict-item]
            assert name in refusal(gguf_check.check_text_model, path)
        for other in ((shape[0] * 2, *shape[1:]), (*shape, 2), shape[::-1] if shape != shape[::-1] else (1,)):
            path = maker.write_text(tmp_path / "a.gguf", arch, tensors={name: (other, Q.F32)})
            assert name in refusal(gguf_check.check_text_model, path)
        for kind in (Q.I32, Q.F16 if len(shape) == 1 else Q.I8):
            path = maker.write_text(tmp_path / "a.gguf", arch, tensors={name: (shape, kind)})
            assert name in refusal(gguf_check.check_text_model, path)


@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(3, 2, 16), (2, 1, 15)])
def test_heads_that_cannot_be_are_refused_though_all_shapes_agree(
    tmp_path: Path, heads: int, kv_heads: int, head: int
) -> None:
    keys = {"head_count": heads, "head_count_kv": kv_heads, "key_length": head, "value_length": head}
    tensors: maker.Tensors = {}
    for i in range(maker.LAYERS):
        tensors[f"blk.{i}.attn_q.weight"] = ((maker.WIDTH, heads * head), Q.F32)
        tensors[f"blk.{i}.attn_k.weight"] = ((maker.WIDTH, kv_heads * head), Q.F32)
        tensors[f"blk.{i}.attn_v.weight"] = ((maker.WIDTH, kv_heads * head), Q.F32)
        tensors[f"blk.{i}.attn_output.weight"] = ((heads * head, maker.WIDTH), Q.F32)
        tensors |= {f"blk.{i}.attn_{x}_norm.weight": ((head,), Q.F32) for x in "qk"}
    given: maker.Keys = {f"qwen3vl.attention.{key}": u32(value) for key, value in keys.items()}
    given["qwen3vl.rope.dimension_sections"] = array(T.INT32, [head // 2, 0, 0, 0])
    path = maker.write_text(tmp_path / "a.gguf", keys=given, tensors=tensors)
    assert f"{heads} heads of {head}" in refusal(gguf_check.check_text_model, path)


@pytest.mark.parametrize(
    ("name", "shape"), [("output.weight", (maker.WIDTH, 41)), ("output.bias", (41,)), ("blk.0.attn_q.bias", (31,))]
)
def test_a_tensor_that_may_be_missing_has_its_shape_if_it_is_there(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    path = maker.write_text(tmp_path / "a.gguf", tensors={name: (shape, Q.F32)})
    assert name in refusal(gguf_check.check_text_model, path)


def test_weights_may_be_quantized_and_trailing_ones_do_not_count(tmp_path: Path) -> None:
    tensors: maker.Tensors = {
        "token_embd.weight": ((maker.WIDTH, maker.TOKENS, 1, 1), Q.Q8_0),
        "output.weight": ((maker.WIDTH, maker.TOKENS), Q.Q4_0),
        "blk.0.attn_q.weight": ((maker.WIDTH, maker.WIDTH), Q.BF16),
    }
    gguf_check.check_text_model(gguf_file.read(maker.write_text(tmp_path / "a.gguf", tensors=tensors)))


def test_queries_keys_and_values_may_be_one_tensor(tmp_path: Path) -> None:
    fused: maker.Tensors = {f"blk.{i}.attn_{x}.weight": () for i in (0, 1) for x in "qkv"}  # type: ignore[misc]
    fused |= {f"blk.{i}.attn_qkv.weight": ((maker.WIDTH, 64), Q.F32) for i in (0, 1)}
    gguf_check.check_text_model(gguf_file.read(maker.write_text(tmp_path / "a.gguf", tensors=fused)))
    fused["blk.1.attn_qkv.bias"] = ((63,), Q.F32)
    assert "blk.1.attn_qkv.bias" in refusal(
        gguf_check.check_text_model, maker.write_text(tmp_path / "b.gguf", tensors=fused)
    )
    fused["blk.1.attn_qkv.weight"] = ((maker.WIDTH, 96), Q.F32)
    assert "blk.1.attn_qkv" in refusal(
        gguf_check.check_text_model, maker.write_text(tmp_path / "b.gguf", tensors=fused)
    )


# clip.cpp asserts the type of every key it reads, and the shape of nothing.
PROJECTOR_KEYS: list[tuple[str, str, Any]] = [
    ("qwen3vl", "has_vision_encoder", ()),
    ("qwen3vl", "has_vision_encoder", (T.BOOL, False)),
    ("qwen3vl", "has_vision_encoder", u32(1)),
    ("qwen3vl", "has_audio_encoder", (T.BOOL, True)),
    ("qwen3vl", "has_gen_audio_encoder", (T.BOOL, True)),
    ("qwen3vl", "projector_type", ()),
    ("qwen3vl", "projector_type", u32(1)),
    ("qwen3vl", "projector_type", (T.STRING, "qwen2vl_merger")),
    ("qwen3vl", "use_gelu", u32(1)),
    ("qwen3vl", "use_silu", (T.BOOL, True)),
    ("qwen3vl", "minicpmv_version", u32(1)),
    ("qwen3vl", "audio.num_mel_bins", (T.STRING, "80")),
    ("qwen3vl", "gen.audio.block_count", (T.INT32, 8)),
    ("qwen3vl", "vision.image_max_pixels", (T.UINT64, 8)),
    ("qwen3vl", "vision.embedding_length", ()),
    ("qwen3vl", "vision.embedding_length", u32(0)),
    ("qwen3vl", "vision.embedding_length", u32(24)),
    ("qwen3vl", "vision.embedding_length", (T.INT32, 16)),
    ("qwen3vl", "vision.feed_forward_length", u32(25)),
    ("qwen2vl", "vision.feed_forward_length", ()),
    ("qwen3vl", "vision.block_count", u32(0)),
    ("qwen3vl", "vision.block_count", u32(2)),
    ("qwen3vl", "vision.block_count", u32(4)),
    ("qwen3vl", "vision.block_count", u32(1 << 30)),
    ("qwen3vl", "vision.projection_dim", ()),
    ("qwen3vl", "vision.projection_dim", u32(31)),
    ("qwen3vl", "vision.attention.head_count", u32(0)),
    ("qwen3vl", "vision.attention.head_count", u32(3)),
    ("qwen3vl", "vision.attention.head_count", u32(8)),  # ggml_rope_multi: half a head is odd
    ("qwen3vl", "vision.attention.head_dim", u32(4)),
    ("qwen3vl", "vision.attention.head_count_kv", u32(1)),
    ("qwen3vl", "vision.attention.layer_norm_epsilon", ()),
    ("qwen3vl", "vision.attention.layer_norm_epsilon", f32(NAN)),  # ggml_norm
    ("qwen3vl", "vision.attention.layer_norm_epsilon", (T.FLOAT64, 1e-6)),
    ("qwen3vl", "vision.image_size", ()),
    ("qwen3vl", "vision.image_size", u32(0)),
    ("qwen3vl", "vision.image_size", u32(8193)),
    ("qwen3vl", "vision.patch_size", u32(0)),
    ("qwen3vl", "vision.patch_size", u32(8)),
    ("qwen3vl", "vision.patch_size", u32(57)),
    ("qwen3vl", "vision.spatial_merge_size", u32(1)),
    ("qwen3vl", "vision.spatial_merge_size", u32(3)),
    ("qwen3vl", "vision.image_mean", ()),
    ("qwen3vl", "vision.image_mean", array(T.FLOAT32, [0.5, 0.5])),
    ("qwen3vl", "vision.image_mean", array(T.FLOAT32, [0.5, 0.5, NAN])),
    ("qwen3vl", "vision.image_mean", array(T.FLOAT64, [0.5, 0.5, 0.5])),
    ("qwen3vl", "vision.image_std", array(T.FLOAT32, [0.5, 0.0, 0.5])),
    ("qwen3vl", "vision.is_deepstack_layers", array(T.BOOL, [True, False, False])),
    ("qwen3vl", "vision.is_deepstack_layers", array(T.BOOL, [False, True])),
    ("qwen2vl", "vision.n_wa_pattern", u32(2)),  # clip.cpp leaves the window indices unset
    ("qwen2.5vl", "vision.n_wa_pattern", ()),
    ("qwen2.5vl", "vision.n_wa_pattern", u32(1000)),
    ("qwen2.5vl", "vision.n_wa_pattern", (T.INT32, 2)),
]


@pytest.mark.parametrize(("family", "key", "value"), PROJECTOR_KEYS)
def test_a_projector_with_a_wrong_hyperparameter_is_refused(
    tmp_path: Path, family: str, key: str, value: tuple[Any, ...]
) -> None:
    path = maker.write_projector(tmp_path / "a.gguf", family, keys={f"clip.{key}": value})
    refusal(gguf_check.check_projector, path)


OPTIONAL = re.compile(r"v\.post_ln|attn_out\.bias|ffn_(up|down|gate)\.bias")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projector_without_a_tensor_or_with_another_shape_or_type_is_refused(tmp_path: Path, family: str) -> None:
    for name, (shape, _) in maker.projector_tensors(family).items():
        bias_of_rms_norm = family == "qwen2.5vl" and re.search(r"ln\d\.bias", name)
        if not OPTIONAL.search(name) and not bias_of_rms_norm:
            path = maker.write_projector(tmp_path / "a.gguf", family, tensors={name: ()})  # type: ignore[dict-item]
            refusal(gguf_check.check_projector, path)
        for other in ((shape[0] * 2, *shape[1:]), (*shape[:-1], shape[-1] * 3), (shape[0],) if shape[1:] else (1,)):
            path = maker.write_projector(tmp_path / "a.gguf", family, tensors={name: (other, Q.F32)})
            refusal(gguf_check.check_projector, path)
        for kind in (Q.I32, Q.F16 if len(shape) == 1 or "position" in name else Q.F64):
            path = maker.write_projector(tmp_path / "a.gguf", family, tensors={name: (shape, kind)})
            refusal(gguf_check.check_projector, path)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("qwen3vl", "v.class_embd", (16,)),
        ("qwen2vl", "v.class_embd", (16,)),
        ("qwen2.5vl", "v.patch_embd.bias", (16,)),
        ("qwen3vl", "v.pre_ln.weight", (17,)),
        ("qwen3vl", "v.blk.0.ffn_gate.weight", (16, 25)),
        ("qwen3vl", "v.blk.3.ln1.weight", (16,)),
        ("qwen3vl", "v.deepstack.0.fc1.weight", (64, 64)),
        ("qwen2vl", "v.deepstack.0.fc1.weight", (64, 64)),
    ],
)
def test_a_projector_with_a_tensor_that_its_graph_cannot_have_is_refused(
    tmp_path: Path, family: str, name: str, shape: tuple[int, ...]
) -> None:
    path = maker.write_projector(tmp_path / "a.gguf", family, tensors={name: (shape, Q.F32)})
    refusal(gguf_check.check_projector, path)


def test_deepstack_is_for_qwen3vl_alone(tmp_path: Path) -> None:
    branch = {name: value for name, value in maker.projector_tensors().items() if "deepstack" in name}
    path = maker.write_projector(tmp_path / "a.gguf", "qwen2vl", tensors=branch)
    assert "DeepStack" in refusal(gguf_check.check_projector, path)


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0])
def test_a_projector_of_another_type_passes_where_its_rows_allow_it(tmp_path: Path, kind: Any) -> None:
    tensors = {
        name: (shape, kind)
        for name, (shape, _) in maker.projector_tensors().items()
        if len(shape) == 2 and shape[0] % 32 == 0 and "position" not in name
    }
    assert tensors
    gguf_check.check_projector(gguf_file.read(maker.write_projector(tmp_path / "a.gguf", tensors=tensors)))


@pytest.mark.parametrize("hidden", [0, maker.WIDTH])
def test_an_old_projector_with_swapped_names_and_another_hidden_width_passes(tmp_path: Path, hidden: int) -> None:
    tensors: maker.Tensors = {}
    for i in range(maker.V_LAYERS):
        for up, down in (("ffn_up", "ffn_down"), ("ffn_down", "ffn_up")):
            for kind in ("weight", "bias"):
                tensors[f"v.blk.{i}.{up}.{kind}"] = maker.projector_tensors("qwen2vl")[f"v.blk.{i}.{down}.{kind}"]
    keys = {"clip.vision.feed_forward_length": u32(hidden)}
    path = maker.write_projector(tmp_path / "a.gguf", "qwen2vl", keys=keys, tensors=tensors)
    gguf_check.check_projector(gguf_file.read(path))


def test_a_pair_of_one_width_and_family_passes(tmp_path: Path) -> None:
    for arch, family in (("qwen3vl", "qwen3vl"), ("qwen2vl", "qwen2vl"), ("qwen2vl", "qwen2.5vl")):
        text = gguf_file.read(maker.write_text(tmp_path / "a.gguf", arch))
        projector = gguf_file.read(maker.write_projector(tmp_path / "b.gguf", family))
        gguf_check.check_pair(text, projector)
        assert gguf_check.input_width(text) == maker.WIDTH * (2 if arch == "qwen3vl" else 1)


def test_a_pair_of_two_widths_is_refused_with_both(tmp_path: Path) -> None:
    text = maker.write_text(tmp_path / "a.gguf", keys={"qwen3vl.n_deepstack_layers": u32(2)})
    message = refusal(gguf_check.check_pair, text, maker.write_projector(tmp_path / "b.gguf"))
    assert "width 64" in message
    assert "takes 96" in message


def test_a_pair_of_two_families_is_refused_though_its_widths_agree(tmp_path: Path) -> None:
    text = maker.write_text(tmp_path / "a.gguf", keys={"qwen3vl.n_deepstack_layers": u32(0)})
    projector = maker.write_projector(tmp_path / "b.gguf", "qwen2.5vl")
    assert "projector for qwen2.5vl" in refusal(gguf_check.check_pair, text, projector)
