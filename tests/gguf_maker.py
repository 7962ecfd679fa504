"""Headers of tiny Qwen-VL models for the tests, written by the gguf package, with zeros for weights."""

from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np

T = gguf.GGUFValueType
Q = gguf.GGMLQuantizationType
Keys: TypeAlias = dict[str, tuple[Any, ...]]
Tensors: TypeAlias = dict[str, tuple[tuple[int, ...], Any]]

WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, LAYERS, TOKENS = 32, 2, 1, 16, 48, 2, 40
V_WIDTH, V_HEADS, V_HIDDEN, V_LAYERS, PATCH = 16, 2, 24, 3, 4


def u32(value: int) -> tuple[Any, ...]:
    return (T.UINT32, value)


def f32(value: float) -> tuple[Any, ...]:
    return (T.FLOAT32, value)


def array(kind: Any, values: list[Any]) -> tuple[Any, ...]:
    return (T.ARRAY, kind, values)


def text_keys(arch: str = "qwen3vl") -> Keys:
    keys: Keys = {
        "general.architecture": (T.STRING, arch),
        "general.name": (T.STRING, "Tiny"),
        f"{arch}.block_count": u32(LAYERS),
        f"{arch}.context_length": u32(512),
        f"{arch}.embedding_length": u32(WIDTH),
        f"{arch}.feed_forward_length": u32(HIDDEN),
        f"{arch}.attention.head_count": u32(HEADS),
        f"{arch}.attention.head_count_kv": u32(KV_HEADS),
        f"{arch}.attention.key_length": u32(HEAD),
        f"{arch}.attention.value_length": u32(HEAD),
        f"{arch}.attention.layer_norm_rms_epsilon": f32(1e-6),
        f"{arch}.rope.freq_base": f32(1e6),
        f"{arch}.rope.dimension_sections": array(T.INT32, [4, 2, 2, 0]),
        "tokenizer.ggml.model": (T.STRING, "gpt2"),
        "tokenizer.ggml.pre": (T.STRING, "qwen2"),
        "tokenizer.ggml.tokens": array(T.STRING, [f"t{i}" for i in range(TOKENS)]),
        "tokenizer.ggml.token_type": array(T.INT32, [1] * TOKENS),
        "tokenizer.ggml.merges": array(T.STRING, ["a b", "b c"]),
    }
    if arch == "qwen3vl":
        keys["qwen3vl.n_deepstack_layers"] = u32(1)
    if arch == "qwen3vlmoe":
        keys["qwen3vlmoe.expert_count"] = u32(4)
        keys["qwen3vlmoe.expert_used_count"] = u32(2)
        keys["qwen3vlmoe.expert_feed_forward_length"] = u32(8)
    return keys


def text_tensors(arch: str = "qwen3vl") -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (WIDTH, TOKENS), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (WIDTH,),
            "attn_q.weight": (WIDTH, HEADS * HEAD),
            "attn_k.weight": (WIDTH, KV_HEADS * HEAD),
            "attn_v.weight": (WIDTH, KV_HEADS * HEAD),
            "attn_output.weight": (HEADS * HEAD, WIDTH),
            "ffn_norm.weight": (WIDTH,),
        }
        if arch == "qwen2vl":
            layer |= {f"attn_{x}.bias": (n,) for x, n in (("q", WIDTH), ("k", HEAD), ("v", HEAD))}
        else:
            layer |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        if arch == "qwen3vlmoe":
            layer |= {"ffn_gate_inp.weight": (WIDTH, 4), "ffn_down_exps.weight": (8, WIDTH, 4)}
            layer |= {"ffn_gate_exps.weight": (WIDTH, 8, 4), "ffn_up_exps.weight": (WIDTH, 8, 4)}
        else:
            layer |= {"ffn_gate.weight": (WIDTH, HIDDEN), "ffn_up.weight": (WIDTH, HIDDEN)}
            layer |= {"ffn_down.weight": (HIDDEN, WIDTH)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {name: (shape, Q.F32) for name, shape in shapes.items()}


def projector_keys(family: str = "qwen3vl") -> Keys:
    keys: Keys = {
        "general.architecture": (T.STRING, "clip"),
        "general.name": (T.STRING, "Tiny"),
        "clip.has_vision_encoder": (T.BOOL, True),
        "clip.projector_type": (T.STRING, f"{family}_merger"),
        "clip.use_gelu": (T.BOOL, True),
        "clip.vision.embedding_length": u32(V_WIDTH),
        "clip.vision.feed_forward_length": u32(V_HIDDEN),
        "clip.vision.block_count": u32(V_LAYERS),
        "clip.vision.projection_dim": u32(WIDTH),
        "clip.vision.attention.head_count": u32(V_HEADS),
        "clip.vision.attention.layer_norm_epsilon": f32(1e-6),
        "clip.vision.image_size": u32(64),
        "clip.vision.patch_size": u32(PATCH),
        "clip.vision.spatial_merge_size": u32(2),
        "clip.vision.image_mean": array(T.FLOAT32, [0.5] * 3),
        "clip.vision.image_std": array(T.FLOAT32, [0.5] * 3),
    }
    if family == "qwen2.5vl":
        keys["clip.vision.n_wa_pattern"] = u32(2)
    if family == "qwen3vl":
        keys["clip.vision.is_deepstack_layers"] = array(T.BOOL, [False, True, False])
    return keys


def projector_tensors(family: str = "qwen3vl") -> Tensors:
    w, merged = V_WIDTH, 4 * V_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (PATCH, PATCH, 3, w),
        "v.patch_embd.weight.1": (PATCH, PATCH, 3, w),
        "v.post_ln.weight": (w,),
        "mm.0.weight": (merged, merged),
        "mm.0.bias": (merged,),
        "mm.2.weight": (merged, WIDTH),
        "mm.2.bias": (WIDTH,),
    }
    if family == "qwen3vl":
        shapes |= {"v.patch_embd.bias": (w,), "v.position_embd.weight": (w, 16)}
        stem = "v.deepstack.1."
        shapes |= {stem + "norm.weight": (merged,), stem + "norm.bias": (merged,)}
        shapes |= {stem + "fc1.weight": (merged, merged), stem + "fc1.bias": (merged,)}
        shapes |= {stem + "fc2.weight": (merged, WIDTH), stem + "fc2.bias": (WIDTH,)}
    for i in range(V_LAYERS):
        layer: dict[str, tuple[int, ...]] = {f"ln{n}.{x}": (w,) for n in (1, 2) for x in ("weight", "bias")}
        if family == "qwen3vl":
            layer |= {"attn_qkv.weight": (w, 3 * w), "attn_qkv.bias": (3 * w,)}
        else:
            layer |= {f"attn_{x}.weight": (w, w) for x in "qkv"} | {f"attn_{x}.bias": (w,) for x in "qkv"}
        layer |= {"attn_out.weight": (w, w), "attn_out.bias": (w,)}
        layer |= {"ffn_up.weight": (w, V_HIDDEN), "ffn_up.bias": (V_HIDDEN,)}
        layer |= {"ffn_down.weight": (V_HIDDEN, w), "ffn_down.bias": (w,)}
        if family == "qwen2.5vl":
            layer |= {"ffn_gate.weight": (w, V_HIDDEN), "ffn_gate.bias": (V_HIDDEN,)}
        shapes |= {f"v.blk.{i}.{name}": shape for name, shape in layer.items()}
    return {name: (shape, Q.F32) for name, shape in shapes.items()}


def write(path: Path, keys: Keys, tensors: Tensors) -> Path:
    """Write a GGUF of these keys and zero-filled tensors (shapes in ggml's order)."""
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].pop("general.architecture")
    for key, (kind, *value) in keys.items():
        sub = value[0] if kind == T.ARRAY else None
        writer.add_key_value(key, value[-1], kind, sub)
    for name, (shape, kind) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        row = shape[0] // block * size if shape else size
        data = np.zeros((*shape[:0:-1], row), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_text(path: Path, arch: str = "qwen3vl", keys: Keys | None = None, tensors: Tensors | None = None) -> Path:
    """Write a sound text model, with some keys and tensors given, and those without a value left out."""
    return write(path, _merge(text_keys(arch), keys), _merge(text_tensors(arch), tensors))


def write_projector(
    path: Path, family: str = "qwen3vl", keys: Keys | None = None, tensors: Tensors | None = None
) -> Path:
    """Write a sound projector file, with some keys and tensors given, and those without a value left out."""
    return write(path, _merge(projector_keys(family), keys), _merge(projector_tensors(family), tensors))


def _merge(sound: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (sound | (given or {})).items() if value}
