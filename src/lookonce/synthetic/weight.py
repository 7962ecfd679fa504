"""Seeded random weights under transformers' tensor names, made one at a time.

Knows nothing of GGUF. Values come from raw generator bits by exact arithmetic, so that a seed gives the same
bits with every numpy; scales keep activations near one and let pictures change the answer.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lookonce.synthetic.shape import Shape, TextShape, VisionShape

__all__ = ["NamedWeights", "TrainedWeights", "Weights"]


class NamedWeights(Protocol):
    """All weights of one model by transformers' state-dict names, random or trained."""

    def __iter__(self) -> Iterator[str]:
        """Names, in the order in which they are written."""

    def __getitem__(self, name: str, /) -> NDArray[np.float32]:
        """One tensor's values."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """One tensor's shape."""


class TrainedWeights(Mapping[str, NDArray[np.float32]]):
    """Weights that are at hand. A tied LM head, which is the embeddings once more, must not be among them."""

    def __init__(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        self._weights = dict(weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._weights[name]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor."""
        return self._weights[name].shape


@dataclass(frozen=True, slots=True)
class _Spec:
    """Shape and distribution of one tensor: uniform around `mean` with standard deviation `deviation`."""

    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0


def _linear(rows: int, columns: int, gain: float) -> _Spec:
    return _Spec((rows, columns), gain / math.sqrt(columns))


def _norm(width: int, mean: float = 1.0) -> _Spec:
    return _Spec((width,), 0.1 * mean, mean)


def _text(shape: Shape) -> dict[str, _Spec]:
    text = shape.text
    specs = {"model.language_model.embed_tokens.weight": _Spec((text.vocab_size, text.hidden_size), 1.0)}
    for layer in range(text.layers):
        prefix = f"model.language_model.layers.{layer}."
        specs |= {prefix + name: spec for name, spec in _text_layer(shape.family, text).items()}
    specs["model.language_model.norm.weight"] = _norm(text.hidden_size)
    if not text.tied:
        specs["lm_head.weight"] = _linear(text.vocab_size, text.hidden_size, 3.0)
    return specs


def _text_layer(family: str, text: TextShape) -> dict[str, _Spec]:
    hidden, inner = text.hidden_size, text.intermediate_size
    q_width, kv_width = text.heads * text.head_dim, text.kv_heads * text.head_dim
    specs = {
        "input_layernorm.weight": _norm(hidden),
        "self_attn.q_proj.weight": _linear(q_width, hidden, 1.6),
        "self_attn.k_proj.weight": _linear(kv_width, hidden, 1.6),
        "self_attn.v_proj.weight": _linear(kv_width, hidden, 1.0),
        "self_attn.o_proj.weight": _linear(hidden, q_width, 1.5),
        "post_attention_layernorm.weight": _norm(hidden),
        "mlp.gate_proj.weight": _linear(inner, hidden, 1.0),
        "mlp.up_proj.weight": _linear(inner, hidden, 1.0),
        "mlp.down_proj.weight": _linear(hidden, inner, 1.5),
    }
    if family == "qwen3vl":
        # Attention as sharp as a trained model's: with norms of one it would average a picture away.
        specs["self_attn.q_norm.weight"] = _norm(text.head_dim, 1.6)
        specs["self_attn.k_norm.weight"] = _norm(text.head_dim, 1.6)
    else:
        specs["self_attn.q_proj.bias"] = _Spec((q_width,), 0.3)
        specs["self_attn.k_proj.bias"] = _Spec((kv_width,), 0.3)
        specs["self_attn.v_proj.bias"] = _Spec((kv_width,), 0.3)
    return specs


def _with_biases(specs: dict[str, _Spec]) -> dict[str, _Spec]:
    """Add to every `.weight` a small `.bias` of its first dimension."""
    both = {}
    for name, spec in specs.items():
        both[name] = spec
        both[name.removesuffix("weight") + "bias"] = _Spec(spec.shape[:1], 0.1)
    return both


def _vision(shape: Shape) -> dict[str, _Spec]:
    vision = shape.vision
    patch = (3, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patch_embed = _Spec((vision.hidden_size, *patch), 2.0 / math.sqrt(math.prod(patch)))
    blocks = _qwen3_block(vision) if shape.family == "qwen3vl" else _qwen25_block(vision)
    specs = {"patch_embed.proj.weight": patch_embed}
    if shape.family == "qwen3vl":
        specs["patch_embed.proj.bias"] = _Spec((vision.hidden_size,), 0.1)
        specs["pos_embed.weight"] = _Spec((vision.n_positions, vision.hidden_size), 0.5)
    for block in range(vision.depth):
        specs |= {f"blocks.{block}.{name}": spec for name, spec in blocks.items()}
    specs |= _mergers(shape)
    return {"model.visual." + name: spec for name, spec in specs.items()}


def _qwen3_block(vision: VisionShape) -> dict[str, _Spec]:
    width, inner = vision.hidden_size, vision.intermediate_size
    return _with_biases(
        {
            "norm1.weight": _norm(width),
            "attn.qkv.weight": _linear(3 * width, width, 1.3),
            "attn.proj.weight": _linear(width, width, 1.0),
            "norm2.weight": _norm(width),
            "mlp.linear_fc1.weight": _linear(inner, width, 1.0),
            "mlp.linear_fc2.weight": _linear(width, inner, 1.0),
        }
    )


def _qwen25_block(vision: VisionShape) -> dict[str, _Spec]:
    width, inner = vision.hidden_size, vision.intermediate_size
    linear = _with_biases(
        {
            "attn.qkv.weight": _linear(3 * width, width, 1.3),
            "attn.proj.weight": _linear(width, width, 1.0),
            "mlp.gate_proj.weight": _linear(inner, width, 1.0),
            "mlp.up_proj.weight": _linear(inner, width, 1.0),
            "mlp.down_proj.weight": _linear(width, inner, 1.5),
        }
    )
    return {"norm1.weight": _norm(width), "norm2.weight": _norm(width), **linear}


def _mergers(shape: Shape) -> dict[str, _Spec]:
    """Give the projector and the DeepStack mergers, scaled so that rows are about as large as token embeddings."""
    width = shape.vision.hidden_size
    merged, out = width * shape.vision.merge_size**2, shape.text.hidden_size
    if shape.family == "qwen2.5vl":
        mlp = {"mlp.0.weight": _linear(merged, merged, 1.4), "mlp.2.weight": _linear(out, merged, 1.4)}
        return {f"merger.{name}": spec for name, spec in {"ln_q.weight": _norm(width), **_with_biases(mlp)}.items()}

    def merger(norm_width: int, gain: float) -> dict[str, _Spec]:
        return _with_biases(
            {
                "norm.weight": _norm(norm_width),
                "linear_fc1.weight": _linear(merged, merged, 1.4),
                "linear_fc2.weight": _linear(out, merged, gain),
            }
        )

    specs = {f"merger.{name}": spec for name, spec in merger(width, 1.4).items()}
    for index in range(len(shape.vision.deepstack)):
        specs |= {f"deepstack_merger_list.{index}.{name}": spec for name, spec in merger(merged, 0.7).items()}
    return specs


class Weights(Mapping[str, NDArray[np.float32]]):
    """All weights of one model, float32, by transformers' state-dict names; each is made when it is asked for.

    Rows of the LM head named in `quiet` are damped, so that greedy decoding never picks those tokens.

    >>> from lookonce.synthetic.shape import find_shape
    >>> weights = Weights(find_shape("qwen3vl", "tiny"), seed=0)
    >>> weights["model.language_model.norm.weight"].shape
    (256,)
    """

    def __init__(self, shape: Shape, *, seed: int, quiet: tuple[int, ...] = ()) -> None:
        self._specs = {**_text(shape), **_vision(shape)}
        self._seed = seed
        self._quiet = list(quiet)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor without making it."""
        return self._specs[name].shape

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        spec = self._specs[name]
        count = math.prod(spec.shape)
        bits = np.random.SFC64([self._seed, zlib.crc32(name.encode())]).random_raw((count + 3) // 4)
        # The raw words are little-endian by definition, whatever the machine.
        values = bits.astype("<u8", copy=False).view("<u2")[:count].astype(np.float32)
        values -= np.float32(32767.5)
        values *= np.float32(spec.deviation * math.sqrt(12) / 65536)
        if spec.mean:
            values += np.float32(spec.mean)
        values = values.reshape(spec.shape)
        if name == "lm_head.weight":
            values[self._quiet] *= np.float32(0.05)
        return values
