"""What llama.cpp and libmtmd need of the Qwen-VL family: each hyper-parameter, and each tensor's shape.

Written after src/models/{qwen2vl,qwen3vl,qwen3vlmoe}.cpp and tools/mtmd/{clip.cpp,models/qwen2vl.cpp,
models/qwen3vl.cpp} of llama.cpp, where what fails is an assertion, a null pointer or a division by zero.
"""

import math
import re

from lookonce.gguf_field import integer, numbers, optional, positive, require, wrong
from lookonce.gguf_file import GgufFile

__all__ = ["check_qwen_projector", "check_qwen_text"]

_MAX_WIDTH = 1 << 17
_MAX_INT = (1 << 31) - 1
# clip.cpp's graph holds 8,192 nodes; a layer with a DeepStack branch takes some 45.
_MAX_VISION_LAYERS = 128
_MAX_IMAGE_SIZE = 8192
# Qwen2.5-VL's windows are 112 pixels wide; a merged token wider than that makes clip.cpp loop for ever.
_MAX_PATCH = 56
_KERNELS = ("F32", "F16", "BF16")


def check_qwen_text(gguf: GgufFile, layers: int, n_tokens: int) -> None:
    """Check hyper-parameters and tensors as src/models/{qwen2vl,qwen3vl,qwen3vlmoe}.cpp use them."""
    arch = gguf.architecture
    width = integer(gguf, f"{arch}.embedding_length", 1, _MAX_WIDTH)
    integer(gguf, f"{arch}.context_length", 1, _MAX_INT)
    integer(gguf, f"{arch}.embedding_length_out", width, width, width)
    integer(gguf, f"{arch}.nextn_predict_layers", 0, 0, 0)
    integer(gguf, f"{arch}.n_deepstack_layers", 0, layers if arch != "qwen2vl" else 0, 0)
    positive(gguf, f"{arch}.attention.layer_norm_rms_epsilon")
    positive(gguf, f"{arch}.rope.freq_base", 1e4)
    positive(gguf, f"{arch}.rope.scaling.factor", 1.0)
    heads = integer(gguf, f"{arch}.attention.head_count", 1, width)
    kv_heads = integer(gguf, f"{arch}.attention.head_count_kv", 1, heads, heads)
    head = integer(gguf, f"{arch}.attention.key_length", 2, width, width // heads)
    if heads % kv_heads or head % 2 or (head * heads != width and f"{arch}.attention.key_length" not in gguf.types):
        raise wrong(gguf, f"has {heads} heads of {head} with {kv_heads} for keys and width {width:,}, which cannot be")
    # The graph asserts that keys, values and rotation are of one size; rope divides by the sections' sum.
    integer(gguf, f"{arch}.attention.value_length", head, head, head)
    integer(gguf, f"{arch}.rope.dimension_count", head, head, head)
    sections = numbers(gguf, f"{arch}.rope.dimension_sections", 4, ("[i32]", "[u32]"))
    if min(sections) < 0 or sum(sections) != head // 2:
        raise wrong(gguf, f"has {sections} as {arch}.rope.dimension_sections, whose sum is not {head // 2}")
    if gguf.metadata.get(f"{arch}.attention.causal", True) is not True:
        raise wrong(gguf, f"has {arch}.attention.causal false, which no Qwen-VL model is")
    if gguf.metadata["tokenizer.ggml.model"] != "gpt2":
        raise wrong(gguf, "has a tokenizer.ggml.model other than gpt2")
    for name in gguf.tensors:
        if (match := re.match(r"blk\.(\d+)\.", name)) and int(match[1]) >= layers:
            raise wrong(gguf, f"has the tensor {name}, but {layers} layers ({arch}.block_count)")
    require(gguf, "token_embd.weight", width, n_tokens)
    require(gguf, "output_norm.weight", width)
    optional(gguf, "output.weight", width, n_tokens)
    optional(gguf, "output.bias", n_tokens)
    for i in range(layers):
        _check_text_layer(gguf, f"blk.{i}.", width, heads * head, kv_heads * head)


def _check_text_layer(gguf: GgufFile, blk: str, width: int, queries: int, keys: int) -> None:
    arch = gguf.architecture
    require(gguf, blk + "attn_norm.weight", width)
    require(gguf, blk + "ffn_norm.weight", width)
    require(gguf, blk + "attn_output.weight", queries, width)
    if blk + "attn_qkv.weight" in gguf.tensors:
        require(gguf, blk + "attn_qkv.weight", width, queries + 2 * keys)
        optional(gguf, blk + "attn_qkv.bias", queries + 2 * keys)
    for letter, size in (("q", queries), ("k", keys), ("v", keys)):
        if blk + "attn_qkv.weight" not in gguf.tensors:
            require(gguf, f"{blk}attn_{letter}.weight", width, size)
        optional(gguf, f"{blk}attn_{letter}.bias", size)
    if arch != "qwen2vl":
        head = queries // integer(gguf, f"{arch}.attention.head_count", 1, width)
        require(gguf, blk + "attn_q_norm.weight", head)
        require(gguf, blk + "attn_k_norm.weight", head)
    if arch == "qwen3vlmoe":
        count = integer(gguf, f"{arch}.expert_count", 1, _MAX_WIDTH)
        used = integer(gguf, f"{arch}.expert_used_count", 1, count)
        hidden = integer(gguf, f"{arch}.expert_feed_forward_length", 0, _MAX_WIDTH, 0)
        hidden = hidden or integer(gguf, f"{arch}.feed_forward_length", used, _MAX_INT) // used
        require(gguf, blk + "ffn_gate_inp.weight", width, count)
        require(gguf, blk + "ffn_gate_exps.weight", width, hidden, count)
        require(gguf, blk + "ffn_up_exps.weight", width, hidden, count)
        require(gguf, blk + "ffn_down_exps.weight", hidden, width, count)
        return
    hidden = integer(gguf, f"{arch}.feed_forward_length", 1, _MAX_INT)
    require(gguf, blk + "ffn_gate.weight", width, hidden)
    require(gguf, blk + "ffn_up.weight", width, hidden)
    require(gguf, blk + "ffn_down.weight", hidden, width)


def check_qwen_projector(gguf: GgufFile, family: str) -> None:
    """Check the vision tower and projector of `qwen2vl`, `qwen2.5vl` or `qwen3vl`."""
    for key in ("clip.has_audio_encoder", "clip.has_gen_audio_encoder"):
        if gguf.metadata.get(key, False) is not False:
            raise wrong(gguf, f"has {key} true beside a {family} projector")
    if gguf.metadata.get("clip.use_gelu") is True and gguf.metadata.get("clip.use_silu") is True:
        raise wrong(gguf, "has both clip.use_gelu and clip.use_silu true")
    layers = integer(gguf, "clip.vision.block_count", 1, _MAX_VISION_LAYERS)
    width = integer(gguf, "clip.vision.embedding_length", 1, _MAX_WIDTH)
    heads = integer(gguf, "clip.vision.attention.head_count", 1, width)
    if width % (4 * heads):
        raise wrong(gguf, f"has {heads} vision heads for width {width:,}, whose quotient is no multiple of 4")
    head = width // heads
    integer(gguf, "clip.vision.attention.head_dim", head, head, head)
    integer(gguf, "clip.vision.attention.head_count_kv", heads, heads, heads)
    positive(gguf, "clip.vision.attention.layer_norm_epsilon")
    integer(gguf, "clip.vision.image_size", 1, _MAX_IMAGE_SIZE)
    integer(gguf, "clip.vision.spatial_merge_size", 2, 2, 2)
    _check_picture_scale(gguf)
    if family != "qwen3vl":
        # Without windows (0) is how a Qwen2-VL tower works; only Qwen2.5-VL's inputs include their indices.
        default = None if family == "qwen2.5vl" else 0
        integer(gguf, "clip.vision.n_wa_pattern", 0, layers if default is None else 0, default)
    _check_stem(gguf, family, width)
    for i in range(layers):
        _check_vision_layer(gguf, family, f"v.blk.{i}.", width)
    _check_merger(gguf, family, width, layers)


def _check_picture_scale(gguf: GgufFile) -> None:
    for key in ("clip.vision.image_mean", "clip.vision.image_std"):
        values = numbers(gguf, key, 3, ("[f32]",))
        if not all(map(math.isfinite, values)) or (key.endswith("std") and min(values) <= 0):
            raise wrong(gguf, f"has {values} as {key}, which cannot be")


def _check_stem(gguf: GgufFile, family: str, width: int) -> None:
    """Check what comes before the layers: the patch kernels and the learned positions."""
    patch = integer(gguf, "clip.vision.patch_size", 2, _MAX_PATCH)
    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        require(gguf, name, patch, patch, 3, width, types=_KERNELS)
    for name in ("v.pre_ln.weight", "v.pre_ln.bias", "v.post_ln.weight", "v.post_ln.bias"):
        optional(gguf, name, width)
    due = ("v.patch_embd.bias",) if family == "qwen3vl" else ()
    for name in {"v.class_embd", "v.patch_embd.bias"} - set(due):
        if name in gguf.tensors:
            raise wrong(gguf, f"has the tensor {name}, which {family} has not")
    if family == "qwen3vl":
        require(gguf, "v.patch_embd.bias", width)
        # libmtmd stretches the square of learned positions over the picture; ggml stretches F32 alone.
        side = max(2, math.isqrt(_dimension(gguf, "v.position_embd.weight", 1)))
        require(gguf, "v.position_embd.weight", width, side * side, types=("F32",))


def _check_vision_layer(gguf: GgufFile, family: str, blk: str, width: int) -> None:
    bias = optional if family == "qwen2.5vl" else require
    for name in ("ln1", "ln2"):
        require(gguf, f"{blk}{name}.weight", width)
        bias(gguf, f"{blk}{name}.bias", width)
    if family == "qwen3vl":
        require(gguf, blk + "attn_qkv.weight", width, 3 * width)
        require(gguf, blk + "attn_qkv.bias", 3 * width)
    else:
        for letter in "qkv":
            require(gguf, f"{blk}attn_{letter}.weight", width, width)
            require(gguf, f"{blk}attn_{letter}.bias", width)
    require(gguf, blk + "attn_out.weight", width, width)
    optional(gguf, blk + "attn_out.bias", width)
    up, down = blk + "ffn_up", blk + "ffn_down"
    if family != "qwen3vl" and _dimension(gguf, down + ".weight", 0) == width:
        # Older converters wrote the two under each other's names; clip.cpp swaps them back.
        up, down = down, up
    hidden = _dimension(gguf, up + ".weight", 1)
    # clip.cpp does not use the key, and of Qwen2-VL converters write 0 or the text model's width.
    written = integer(gguf, "clip.vision.feed_forward_length", 0, _MAX_INT)
    if family != "qwen2vl" and written != hidden:
        raise wrong(gguf, f"has {up}.weight {hidden:,} wide, which is not clip.vision.feed_forward_length")
    require(gguf, up + ".weight", width, hidden)
    optional(gguf, up + ".bias", hidden)
    require(gguf, down + ".weight", hidden, width)
    optional(gguf, down + ".bias", width)
    if family == "qwen2.5vl" or blk + "ffn_gate.weight" in gguf.tensors:
        require(gguf, blk + "ffn_gate.weight", width, hidden)
        optional(gguf, blk + "ffn_gate.bias", hidden)


def _check_merger(gguf: GgufFile, family: str, width: int, layers: int) -> None:
    """Check the projector and, of Qwen3-VL, its DeepStack branches: each merges 2 x 2 patches into one row."""
    rows = integer(gguf, "clip.vision.projection_dim", 1, _MAX_WIDTH)
    deepstack = {i for i in range(layers) if f"v.deepstack.{i}.fc1.weight" in gguf.tensors}
    branches = [("mm.0", "mm.2")] + [(f"v.deepstack.{i}.fc1", f"v.deepstack.{i}.fc2") for i in sorted(deepstack)]
    for first, second in branches:
        hidden = _dimension(gguf, first + ".weight", 1)
        require(gguf, first + ".weight", 4 * width, hidden)
        require(gguf, first + ".bias", hidden)
        require(gguf, second + ".weight", hidden, rows)
        require(gguf, second + ".bias", rows)
    for i in deepstack:
        require(gguf, f"v.deepstack.{i}.norm.weight", 4 * width)
        require(gguf, f"v.deepstack.{i}.norm.bias", 4 * width)
    for name in gguf.tensors:
        if (match := re.match(r"v\.(?:blk|deepstack)\.(\d+)\.", name)) and int(match[1]) >= layers:
            raise wrong(gguf, f"has the tensor {name}, but {layers} layers (clip.vision.block_count)")
    flags = gguf.metadata.get("clip.vision.is_deepstack_layers")
    if flags is not None and flags != tuple(i in deepstack for i in range(layers)):
        raise wrong(gguf, f"has DeepStack tensors for {sorted(deepstack)}, which its is_deepstack_layers denies")
    if family != "qwen3vl" and deepstack:
        raise wrong(gguf, f"has DeepStack tensors, which {family} has not")


def _dimension(gguf: GgufFile, name: str, axis: int) -> int:
    """Return a dimension of a tensor, 0 where it has none: then `require` says what is wrong."""
    info = gguf.tensors.get(name)
    return info.shape[axis] if info is not None and len(info.shape) > axis else 0
