"""Writes the two GGUF files of a model, tensor by tensor, as llama.cpp's `convert_hf_to_gguf.py` names and types them.

Knows nothing of quantizing beyond Q8_0. Sources: llama.cpp's conversion/{base,qwen,qwenvl,qwen3vl}.py.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from lookonce.gguf_type import FILE_TYPES, converter_type, encode
from lookonce.synthetic.shape import Shape
from lookonce.synthetic.template import CHAT_TEMPLATES
from lookonce.synthetic.vocabulary import Vocabulary
from lookonce.synthetic.weight import NamedWeights

__all__ = ["write_projector", "write_text"]

_TEXT_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_VISION_NAMES = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE_NAMES = {
    "model.language_model.embed_tokens": "token_embd",
    "model.language_model.norm": "output_norm",
    "lm_head": "output",
    "model.visual.patch_embed.proj": "v.patch_embd",
    "model.visual.pos_embed": "v.position_embd",
    "model.visual.merger.norm": "v.post_ln",
    "model.visual.merger.ln_q": "v.post_ln",
    "model.visual.merger.linear_fc1": "mm.0",
    "model.visual.merger.linear_fc2": "mm.2",
    "model.visual.merger.mlp.0": "mm.0",
    "model.visual.merger.mlp.2": "mm.2",
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a file: its name, its shape, and how to make it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[np.float32]]


def write_text(
    path: Path, shape: Shape, weights: NamedWeights, vocabulary: Vocabulary, *, type: str, name: str
) -> None:
    """Write the text model to `path`, whole or not at all."""
    arch = "qwen3vl" if shape.family == "qwen3vl" else "qwen2vl"
    tensors = [
        _Tensor(_ggml_name(key, shape), weights.shape_of(key), lambda key=key: weights[key])  # type: ignore[misc]
        for key in weights
        if not key.startswith("model.visual.")
    ]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        _add_text_shape(writer, shape)
        _add_vocabulary(writer, shape, vocabulary)

    _write(path, tensors, describe, arch=arch, type=type, name=name)


def write_projector(path: Path, shape: Shape, weights: NamedWeights, *, type: str, name: str) -> None:
    """Write the projector file to `path`, whole or not at all."""
    tensors = [
        tensor for key in weights if key.startswith("model.visual.") for tensor in _vision_tensors(key, shape, weights)
    ]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MMPROJ)
        _add_vision_shape(writer, shape)

    _write(path, tensors, describe, arch="clip", type=type, name=name)


def _add_text_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    text = shape.text
    writer.add_block_count(text.layers)
    writer.add_context_length(text.context_length)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.heads)
    writer.add_head_count_kv(text.kv_heads)
    writer.add_rope_dimension_sections([*text.mrope_section, 0])
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    if shape.family == "qwen3vl":
        writer.add_key_length(text.head_dim)
        writer.add_value_length(text.head_dim)
        writer.add_num_deepstack_layers(len(shape.vision.deepstack))


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape, vocabulary: Vocabulary) -> None:
    types = np.full(len(vocabulary.tokens), gguf.TokenType.NORMAL, dtype=np.int32)
    types[list(vocabulary.control)] = gguf.TokenType.CONTROL
    types[list(vocabulary.user_defined)] = gguf.TokenType.USER_DEFINED
    types[list(vocabulary.unused)] = gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(types.tolist())
    writer.add_token_merges([f"{first} {second}" for first, second in vocabulary.merges])
    writer.add_eos_token_id(vocabulary.id_of("<|im_end|>"))
    writer.add_pad_token_id(vocabulary.id_of("<|endoftext|>"))
    writer.add_bos_token_id(vocabulary.id_of("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATES[shape.family])


def _add_vision_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    vision = shape.vision
    qwen3 = shape.family == "qwen3vl"
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(shape.text.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.heads)
    # Qwen2.5-VL's processor keeps CLIP's own statistics.
    writer.add_vision_image_mean([0.5] * 3 if qwen3 else [0.48145466, 0.4578275, 0.40821073])
    writer.add_vision_image_std([0.5] * 3 if qwen3 else [0.26862954, 0.26130258, 0.27577711])
    writer.add_vision_attention_layernorm_eps(1e-6)
    if qwen3:
        writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
        writer.add_vision_use_gelu(True)
        writer.add_vision_spatial_merge_size(vision.merge_size)
        writer.add_vision_is_deepstack_layers([block in vision.deepstack for block in range(vision.depth)])
    else:
        writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN25VL)
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision.full_attention[0] + 1)


def _ggml_name(key: str, shape: Shape) -> str:
    """Give the name in the file for a name in a state dict."""
    stem, _, ending = key.rpartition(".")
    if stem in _WHOLE_NAMES:
        return f"{_WHOLE_NAMES[stem]}.{ending}"
    part, _, rest = stem.removeprefix("model.").partition(".")
    if part == "language_model":
        _, layer, name = rest.split(".", 2)
        return f"blk.{layer}.{_TEXT_NAMES[name]}.{ending}"
    group, index, name = rest.split(".", 2)
    if group == "deepstack_merger_list":
        return f"v.deepstack.{shape.vision.deepstack[int(index)]}.{name.removeprefix('linear_')}.{ending}"
    return f"v.blk.{index}.{_VISION_NAMES[name]}.{ending}"


def _vision_tensors(key: str, shape: Shape, weights: NamedWeights) -> Iterator[_Tensor]:
    """Give the tensors of the file that one of the state dict becomes: two convolutions, or q, k and v."""
    name, whole = _ggml_name(key, shape), weights.shape_of(key)
    if key.endswith("patch_embed.proj.weight"):
        for frame, suffix in enumerate(("", ".1")):
            yield _Tensor(
                name + suffix,
                (*whole[:2], *whole[3:]),
                lambda frame=frame: weights[key][:, :, frame],  # type: ignore[misc]
            )
    elif ".attn.qkv." in key and shape.family == "qwen2.5vl":
        width = whole[0] // 3
        for place, letter in enumerate("qkv"):
            rows = slice(place * width, (place + 1) * width)
            yield _Tensor(
                name.replace("attn_qkv", f"attn_{letter}"),
                (width, *whole[1:]),
                lambda rows=rows: weights[key][rows],  # type: ignore[misc]
            )
    else:
        yield _Tensor(name, whole, lambda: weights[key])


def _ggml_type(tensor: _Tensor, type: str) -> GgmlType:
    return converter_type(tensor.name, len(tensor.shape), tensor.shape[-1], type)


def _write(
    path: Path,
    tensors: list[_Tensor],
    describe: Callable[[gguf.GGUFWriter], None],
    *,
    arch: str,
    type: str,
    name: str,
) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(partial, arch)
    try:
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[type][0])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        describe(writer)
        _write_tensors(writer, partial, tensors, type)
        writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _write_tensors(writer: gguf.GGUFWriter, path: Path, tensors: list[_Tensor], type: str) -> None:
    for tensor in tensors:
        kind = _ggml_type(tensor, type)
        stored = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        size = int(np.prod(stored))
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), size, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(encode(tensor.make(), _ggml_type(tensor, type)))
