"""Refuses a text model or a projector file that llama.cpp would abort on, or that do not fit together.

A failed GGML_ASSERT ends the whole process, so whatever the header shows is checked here first: for the
Qwen-VL family every hyper-parameter and the shape of every tensor (see `gguf_qwen`), for other architectures
what llama.cpp asserts of any. It knows nothing of native code.
"""

import re

from lookonce.errors import ModelFileError
from lookonce.gguf_field import array_length, integer, wrong
from lookonce.gguf_file import GgufFile, strings
from lookonce.gguf_qwen import check_qwen_projector, check_qwen_text

__all__ = ["check_pair", "check_projector", "check_text_model", "families", "family", "input_width"]

_FAMILIES = {"qwen2vl_merger": "qwen2vl", "qwen2.5vl_merger": "qwen2.5vl", "qwen3vl_merger": "qwen3vl"}
_TEXT_FAMILIES = {
    "qwen2vl": ("qwen2vl", "qwen2.5vl"),
    "qwen3vl": ("qwen3vl",),
    "qwen3vlmoe": ("qwen3vl",),
}

# clip.cpp reads these with getters that assert the type; those of "audio" and "gen.audio" are spelt alike.
_CLIP_TYPES = {
    "clip.has_vision_encoder": "bool",
    "clip.has_audio_encoder": "bool",
    "clip.has_gen_audio_encoder": "bool",
    "clip.use_gelu": "bool",
    "clip.use_silu": "bool",
    "clip.projector_type": "str",
    "clip.vision.projector_type": "str",
    "clip.vision.mm_patch_merge_type": "str",
    "clip.vision.model_variant": "str",
    "general.name": "str",
    "general.description": "str",
    "clip.minicpmv_version": "i32",
    "clip.minicpmv_query_num": "u32",
    "clip.vision.attention.layer_norm_epsilon": "f32",
    "clip.vision.swiglu_clamp": "f32",
}
_CLIP_COUNTS = """
    embedding_length feed_forward_length block_count projection_dim attention.head_count attention.head_dim
    attention.head_count_kv image_size image_min_pixels image_max_pixels patch_size preproc_min_tiles
    preproc_max_tiles preproc_image_size projector.scale_factor projector.query_side projector.window_side
    spatial_merge_size n_wa_pattern window_size sam.head_count sam.block_count sam.embedding_length
    expert_used_count num_mel_bins projector.stack_factor chunk_size conv_kernel_size max_pos_emb
    projector.window_size projector.downsample_rate projector.head_count rvq.num_quantizers
    local_block_count local_group_size subsampling_factor
"""
_CLIP_TYPES |= {f"clip.vision.{name}": "u32" for name in _CLIP_COUNTS.split()}

_MAX_LAYERS = 512
_MAX_EXPERTS = 1024
_MAX_WIDTH = 1 << 17


def check_text_model(gguf: GgufFile) -> None:
    """Refuse what cannot be loaded as a text model. Reads the vocabulary: 0.1 s for 150,000 tokens.

    Raises:
        ModelFileError: it is a projector file, or lacks something, or its parts contradict each other.
    """
    if _is_projector(gguf):
        raise ModelFileError(
            f"{gguf.path} is a projector file (mmproj), but a text model was expected: give it as mmproj= / --mmproj"
        )
    arch = gguf.architecture
    if not arch:
        raise wrong(gguf, "has no general.architecture")
    if "token_embd.weight" not in gguf.tensors:
        kind = gguf.metadata.get("general.type", "file")
        raise wrong(gguf, f"is a {arch} {kind} without token_embd.weight, but a text model was expected")
    layers = integer(gguf, f"{arch}.block_count", 1, _MAX_LAYERS)
    integer(gguf, f"{arch}.context_length", 1, 2**31 - 1)
    # load_hparams() asserts the next four of any architecture; llama-context.cpp aborts on another pooling.
    integer(gguf, f"{arch}.nextn_predict_layers", 0, layers, 0)
    scaling = gguf.metadata.get(f"{arch}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise wrong(gguf, f"has {scaling!r} as {arch}.rope.scaling.type, not none, linear, yarn or longrope")
    integer(gguf, f"{arch}.pooling_type", 0, 4, 0)
    _check_experts(gguf)
    n_tokens = _check_vocabulary(gguf)
    if arch in _TEXT_FAMILIES:
        check_qwen_text(gguf, layers, n_tokens)


def check_projector(gguf: GgufFile) -> None:
    """Refuse what cannot be loaded as a projector file.

    Raises:
        ModelFileError: it is a text model, or lacks something, or its parts contradict each other.
    """
    if not _is_projector(gguf):
        raise ModelFileError(
            f"{gguf.path} is a text model ({gguf.architecture or 'of no architecture'}), "
            "but a projector file (mmproj) was expected: give it as model= / --model"
        )
    for key, kind in gguf.types.items():
        due = _CLIP_TYPES.get(re.sub(r"^clip\.(gen\.)?audio\.", "clip.vision.", key), kind)
        if kind != due:
            raise wrong(gguf, f"has {key} as {kind}, not {due}")
    if gguf.metadata.get("clip.has_vision_encoder") is not True:
        raise wrong(gguf, "has no vision tower (clip.has_vision_encoder is not true)")
    kind = family(gguf)
    if not kind:
        raise wrong(gguf, "has no clip.projector_type")
    if kind in _FAMILIES.values():
        check_qwen_projector(gguf, kind)
    else:
        integer(gguf, "clip.vision.block_count", 0, _MAX_LAYERS)


def check_pair(text: GgufFile, projector: GgufFile) -> None:
    """Refuse a projector file whose rows the text model does not take. Both have been checked alone.

    Raises:
        ModelFileError: the width or the family differs.
    """
    kind = family(projector)
    due = _TEXT_FAMILIES.get(text.architecture)
    if due and kind in _FAMILIES.values() and kind not in due:
        raise ModelFileError(
            f"{projector.path} is a projector for {kind}, but {text.path} is a {text.architecture} model: "
            "give the projector that was published with the model"
        )
    width, wanted = _output_width(projector), input_width(text)
    if width and width != wanted:
        raise ModelFileError(
            f"{projector.path} makes rows of width {width:,}, but {text.path} takes {wanted:,}: "
            "give the projector that was published with the model"
        )


def input_width(text: GgufFile) -> int:
    """Return the width of the rows that a text model takes: its own, once more for every DeepStack layer."""
    arch = text.architecture
    width = integer(text, f"{arch}.embedding_length", 1, _MAX_WIDTH)
    return width * (1 + integer(text, f"{arch}.n_deepstack_layers", 0, _MAX_LAYERS, 0))


def family(projector: GgufFile) -> str:
    """Return `qwen2vl`, `qwen2.5vl`, `qwen3vl`, or another projector's type as it is written, or nothing."""
    keys = ("clip.projector_type", "clip.vision.projector_type")
    kind = next((value for key in keys if isinstance(value := projector.metadata.get(key), str) and value), "")
    return _FAMILIES.get(kind, kind)


def families(gguf: GgufFile) -> tuple[str, ...]:
    """Return the families that a checked file of either kind may belong to; a name of its own where it is of none."""
    if _is_projector(gguf):
        return (family(gguf),)
    return _TEXT_FAMILIES.get(gguf.architecture, (gguf.architecture,))


def _output_width(projector: GgufFile) -> int:
    """Return the width of a projector's rows, or 0 where it is not known."""
    kind = family(projector)
    if kind not in _FAMILIES.values():
        return 0
    deepstack = sum(bool(re.fullmatch(r"v\.deepstack\.\d+\.fc1\.weight", name)) for name in projector.tensors)
    return integer(projector, "clip.vision.projection_dim", 1, _MAX_WIDTH) * (1 + deepstack)


def _is_projector(gguf: GgufFile) -> bool:
    return gguf.architecture == "clip" or gguf.metadata.get("general.type") == "mmproj"


def _check_experts(gguf: GgufFile) -> None:
    """Check what load_hparams() asserts of mixtures of experts."""
    arch = gguf.architecture
    count = integer(gguf, f"{arch}.expert_count", 0, _MAX_EXPERTS, 0)
    used = gguf.metadata.get(f"{arch}.expert_used_count", 0)
    most = max(used, default=0) if isinstance(used, tuple) else used
    groups = integer(gguf, f"{arch}.expert_group_count", 0, _MAX_EXPERTS, 0)
    chosen = integer(gguf, f"{arch}.expert_group_used_count", 0, _MAX_EXPERTS, 0)
    whole = isinstance(most, int) and min(count, 1) <= most <= count and (groups < count or groups == count == 0)
    if not whole or (groups > 1 and (count % groups or not 0 < chosen < groups)):
        raise wrong(gguf, f"uses {most} of {count} experts and {chosen} of {groups} groups, which cannot be")


def _check_vocabulary(gguf: GgufFile) -> int:
    """Return the number of tokens after checking all that goes with them."""
    model = gguf.metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str):
        raise wrong(gguf, "has no vocabulary (tokenizer.ggml.model)")
    if model in ("none", "no_vocab"):
        return 0
    n_tokens = array_length(gguf, "tokenizer.ggml.tokens", ("[str]",), None)
    for key, kinds in (("scores", ("[f32]", "[i32]")), ("token_type", ("[i32]",))):
        if f"tokenizer.ggml.{key}" in gguf.types:
            array_length(gguf, f"tokenizer.ggml.{key}", kinds, n_tokens)
    if model == "gpt2" and gguf.metadata.get("tokenizer.ggml.pre") != "kimi-k2":
        array_length(gguf, "tokenizer.ggml.merges", ("[str]",), None)
    # llama-vocab.cpp asserts that no token occurs twice, an empty one standing for its number in brackets.
    tokens = list(strings(gguf, "tokenizer.ggml.tokens"))
    if not n_tokens or len({token or b"[EMPTY_%d]" % i for i, token in enumerate(tokens)}) != n_tokens:
        raise wrong(gguf, f"has {n_tokens:,} tokens in its vocabulary, some of them twice")
    try:
        b"\n".join(tokens).decode()
    except UnicodeDecodeError as error:
        raise wrong(gguf, f"has a token in its vocabulary that is not UTF-8 ({error.reason})") from None
    return n_tokens
