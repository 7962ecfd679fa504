"""The forward pass of training: transformers' Qwen3-VL modules, many pictures and branches at a time.

transformers evaluates pictures one by one and knows no branches; the weights, and what they compute, are its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from .prompt import TRUNK, TokenSequence

__all__ = ["Batch", "collate", "look", "read", "tower_rows"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as tensors, padded on the right.

    `row_places` are the flat places of image tokens, `row_sources` the row (of all pictures' rows) that each takes.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    row_places: Tensor
    row_sources: Tensor
    lasts: Tensor
    targets: Tensor
    target_places: Tensor
    target_weights: Tensor


def collate(sequences: Sequence[TokenSequence], counts: Sequence[int], image_token: int) -> Batch:
    """Make tensors of sequences. `counts` are the rows of each picture, by number."""
    width = max(map(len, sequences))
    shape = (len(sequences), width)
    tokens, branches = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    positions, weights = np.zeros((3, *shape), np.int64), np.zeros(shape, np.float32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    sources: list[NDArray[np.int64]] = []
    for number, one in enumerate(sequences):
        tokens[number, : len(one)] = one.tokens
        branches[number, : len(one)] = one.branches
        positions[:, number, : len(one)] = np.array(one.positions).T
        weights[number, : len(one)] = one.weights
        sources += [np.arange(starts[picture], starts[picture + 1]) for picture in one.pictures]
    seen = (branches[:, None, :] == branches[:, :, None]) | (branches[:, None, :] == TRUNK)
    mask = torch.from_numpy(seen & np.tri(width, dtype=bool))
    places = np.flatnonzero(weights.reshape(-1))
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        mask[:, None],
        torch.from_numpy(np.flatnonzero(tokens.reshape(-1) == image_token)),
        torch.from_numpy(np.concatenate(sources) if sources else np.zeros(0, np.int64)),
        torch.tensor([number * width + len(one) - 1 for number, one in enumerate(sequences)]),
        torch.from_numpy(tokens.reshape(-1)[places]),
        torch.from_numpy(places - 1),
        torch.from_numpy(weights.reshape(-1)[places]),
    )


@lru_cache
def _geometry(rows: int, columns: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    grid = torch.tensor([[1, rows, columns]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    return indices, weights, get_vision_position_ids(grid, 2)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def look(visual: Any, pixels: NDArray[np.uint8]) -> tuple[Tensor, list[Tensor]]:
    """Give the rows (pictures x tokens, width) of pictures of one size (n, height, width, 3), and DeepStack's."""
    hidden, stacked = _tower(visual, pixels)
    return visual.merger(hidden.reshape(-1, hidden.shape[-1])), stacked


def _tower(visual: Any, pixels: NDArray[np.uint8]) -> tuple[Tensor, list[Tensor]]:
    count, height, width, _ = pixels.shape
    rows, columns = height // 16, width // 16
    weight = visual.patch_embed.proj.weight
    scaled = (torch.from_numpy(pixels).to(weight.device).float() / 255 - 0.5) / 0.5
    blocks = scaled.reshape(count, rows // 2, 2, 16, columns // 2, 2, 16, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    flat = blocks.reshape(count, rows * columns, 768)
    # Both frames of a still picture are the same.
    hidden = functional.linear(flat, weight.sum(2).reshape(weight.shape[0], 768), visual.patch_embed.proj.bias)
    indices, shares, places = (one.to(weight.device) for one in _geometry(rows, columns, visual.num_grid_per_side))
    hidden = hidden + (visual.pos_embed(indices) * shares[:, :, None]).sum(1)
    cos, sin = visual.rotary_pos_emb(hidden, places)
    stacked = []
    for index, block in enumerate(visual.blocks):
        hidden = hidden + _look_around(block.attn, block.norm1(hidden), cos, sin)
        hidden = hidden + block.mlp(block.norm2(hidden))
        if index in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
            stacked.append(merger(hidden.reshape(-1, hidden.shape[-1])))
    return hidden, stacked


def _look_around(attention: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    count, length, width = states.shape
    mixed = attention.qkv(states).reshape(count, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = mixed.unbind(0)
    query, key = _rotate(query, cos, sin).to(value.dtype), _rotate(key, cos, sin).to(value.dtype)
    seen = functional.scaled_dot_product_attention(query, key, value)
    return torch.as_tensor(attention.proj(seen.transpose(1, 2).reshape(count, length, width)))


def tower_rows(visual: Any, pictures: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, list[Tensor]]:
    """Give the rows of pictures of any sizes, in their order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(number)
    pieces: dict[int, list[Tensor]] = {}
    for numbers in groups.values():
        main, stacked = look(visual, np.stack([pictures[number] for number in numbers]))
        split = [part.reshape(len(numbers), -1, part.shape[-1]) for part in (main, *stacked)]
        for place, number in enumerate(numbers):
            pieces[number] = [part[place] for part in split]
    ordered = [pieces[number] for number in range(len(pictures))]
    main, *stacked = (torch.cat(list(parts)) for parts in zip(*ordered, strict=True))
    return main, stacked


def read(language: Any, batch: Batch, rows: Tensor | None, stacked: Sequence[Tensor]) -> Tensor:
    """Give the hidden states after the final norm, flat: (sequences x tokens, width)."""
    device = language.embed_tokens.weight.device
    count, length = batch.tokens.shape
    hidden = language.embed_tokens(batch.tokens.to(device))
    width = hidden.shape[-1]
    places, sources = batch.row_places.to(device), batch.row_sources.to(device)
    if rows is not None:
        flat = hidden.reshape(-1, width)
        hidden = flat.index_copy(0, places, rows[sources].to(flat.dtype)).reshape(count, length, width)
    cos, sin = language.rotary_emb(hidden, batch.positions.to(device))
    cos, sin = cos[:, None], sin[:, None]
    mask = batch.mask.to(device)
    for index, layer in enumerate(language.layers):
        hidden = hidden + _attend(layer.self_attn, _norm(layer.input_layernorm, hidden), cos, sin, mask)
        hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
        if rows is not None and index < len(stacked):
            flat = hidden.reshape(-1, width)
            flat = flat.index_add(0, places, stacked[index][sources].to(flat.dtype))
            hidden = flat.reshape(count, length, width)
    return _norm(language.norm, hidden.reshape(-1, width))


def _norm(norm: Any, states: Tensor) -> Tensor:
    return functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _attend(attention: Any, states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    count, length, _ = states.shape
    shape = (count, length, -1, attention.head_dim)
    query = _norm(attention.q_norm, attention.q_proj(states).view(shape)).transpose(1, 2)
    key = _norm(attention.k_norm, attention.k_proj(states).view(shape)).transpose(1, 2)
    value = attention.v_proj(states).view(shape).transpose(1, 2)
    query, key = _rotate(query, cos, sin).to(value.dtype), _rotate(key, cos, sin).to(value.dtype)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return torch.as_tensor(attention.o_proj(seen.transpose(1, 2).reshape(count, length, -1)))
