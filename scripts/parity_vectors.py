"""The part of the comparison that is about vectors and stages: `Embedder` and `extract` against transformers.

Pooling is written out a second time here, over the reference's hidden states.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import lookonce
from lookonce.embedder import PooledTokens
from lookonce.item import Item, Picture
from lookonce.pooling import POOLINGS, Pooling
from lookonce.prompt import TokenRun
from lookonce.stages import Stages
from parity_case import EMBEDDINGS, STAGES, TEXTS, EmbeddingCase, batch_texts, pooled, vector_layers
from parity_picture import make_picture
from parity_report import Report, lowest_cosine, relative_error

if TYPE_CHECKING:
    from parity_reference import Reference

__all__ = ["compare_stages", "compare_vectors", "embedding_item", "embedding_tokens", "exact_model"]

Array = NDArray[np.float32]
_VECTOR_COSINE, _BATCH_COSINE, _STAGE_ERROR = 0.9999, 0.99999, 2e-3
_KINDS: tuple[PooledTokens, ...] = ("all", "text", "image")
_BATCH_SIZES = (3, 16, 256)


@contextmanager
def exact_model(files: tuple[Path, Path]) -> Iterator[lookonce.Model]:
    """Load a pair with K and V in F32, without flash attention, for as long as the block runs."""
    text, projector = files
    with lookonce.load(text, mmproj=projector, kv_type="f32", flash_attention=False, threads=1, store=False) as model:
        yield model


@dataclass(frozen=True, slots=True)
class _Seen:
    """One case: as the library takes it, its hidden states in the reference, and which tokens are image rows."""

    name: str
    item: Item
    states: list[Array]
    is_row: NDArray[np.bool_]


def _see(reference: "Reference", model: lookonce.Model, case: EmbeddingCase) -> _Seen:
    pictures = [make_picture(*size) for size in case.pictures]
    tokens = reference.tokenize(reference.render(case.messages()), pictures)
    item = embedding_item(case, [model.look(picture) for picture in pictures])
    return _Seen(case.name, item, reference.hidden_states(tokens, pictures), np.array(tokens) == reference.image_token)


def embedding_item(case: EmbeddingCase, pictures: Sequence[Picture]) -> Item:
    """Give a case as the library takes it."""
    item: Item = {}
    if case.text:
        item["text"] = case.text
    if pictures:
        item["images"] = list(pictures)
    if case.instruction:
        item["instruction"] = case.instruction
    return item


def embedding_tokens(model: lookonce.Model, case: EmbeddingCase, image_token: int) -> list[int]:
    """Give the ids of the prompt that a case is embedded with, an image token for each row."""
    (prompt,) = lookonce.Embedder(model).prompts(
        [embedding_item(case, [make_picture(*size) for size in case.pictures])]
    )
    ids: list[int] = []
    for run in prompt.runs:
        ids += run.tokens if isinstance(run, TokenRun) else [image_token] * (run.stop - run.start)
    return ids


def compare_vectors(reference: "Reference", files: tuple[Path, Path], report: Report) -> None:
    """Compare the embedding prompt's tokens, and vectors of every kind of input, pooling, layer and tokens."""
    with exact_model(files) as model:
        _compare_embedding_tokens(reference, model, report)
        cases = [
            *EMBEDDINGS,
            *(EmbeddingCase(f"text {number}", text=text) for number, text in enumerate(batch_texts())),
        ]
        seen = [_see(reference, model, case) for case in cases]
        report.line("vectors, lowest cosine", "cases", *POOLINGS)
        layers = vector_layers(len(seen[0].states) - 1)
        for layer, tokens in product(layers, _KINDS):
            _compare_items(seen, model, layer, tokens, report)
        report.line("vectors, batched", "pooling", *(f"batch of {size}" for size in _BATCH_SIZES))
        for layer in layers[1:]:
            _compare_batches(seen, model, layer, report)


def _compare_embedding_tokens(reference: "Reference", model: lookonce.Model, report: Report) -> None:
    cases = [*EMBEDDINGS, *(EmbeddingCase(ascii(text), text=text) for text in TEXTS if text.strip())]
    for case in cases:
        pictures = [make_picture(*size) for size in case.pictures]
        theirs = reference.tokenize(reference.render(case.messages()), pictures)
        if embedding_tokens(model, case, reference.image_token) != theirs:
            report.line(f"embedding prompt of {case.name[:40]}", met=False)
    report.line("embedding prompts", str(len(cases)))


def _compare_items(
    seen: Sequence[_Seen], model: lookonce.Model, layer: int, tokens: PooledTokens, report: Report
) -> None:
    """Compare one layer's vectors, embedded together, for every pooling."""
    seen = [one for one in seen if tokens == "all" or one.is_row.any()]
    cosines: list[float] = []
    for pooling in POOLINGS:
        with lookonce.Embedder(model, pooling=pooling, layer=layer, tokens=tokens) as embedder:
            ours = embedder.embed_batch([one.item for one in seen])
        theirs = np.stack([pooled(one.states[layer + 1], one.is_row, pooling, tokens) for one in seen])
        each = [lowest_cosine(*pair) for pair in zip(ours[:, None], theirs[:, None], strict=True)]
        cosines.append(min(each))
        for one, cosine in zip(seen, each, strict=True):
            if cosine < _VECTOR_COSINE:
                report.line(f"layer {layer}, {tokens}, {pooling}", one.name, f"{cosine:.7f}", met=False)
    report.error("vectors, 1 - cosine", 1 - min(cosines))
    report.line(f"layer {layer}, {tokens} tokens", str(len(seen)), *(f"{cosine:.7f}" for cosine in cosines))


def _compare_batches(seen: Sequence[_Seen], model: lookonce.Model, layer: int, report: Report) -> None:
    """Compare vectors made together with those made one by one, for several batch sizes and orders."""
    items = [one.item for one in seen]
    poolings: tuple[Pooling, ...] = ("mean", "last")
    for pooling in poolings:
        with lookonce.Embedder(model, pooling=pooling, layer=layer) as embedder:
            single = np.concatenate([embedder.embed_batch([item]) for item in items])
            cosines = []
            for batch_size in _BATCH_SIZES:
                order = random.Random(batch_size).sample(range(len(items)), len(items))
                together = embedder.embed_batch([items[place] for place in order], batch_size=batch_size)
                cosines.append(lowest_cosine(together, single[order]))
        report.error("batched against single, 1 - cosine", 1 - min(cosines))
        cells = [f"{cosine:.7f}" for cosine in cosines]
        report.line(f"layer {layer}", pooling, *cells, met=min(cosines) >= _BATCH_COSINE)


def compare_stages(reference: "Reference", files: tuple[Path, Path], report: Report) -> None:
    """Compare every tensor of `extract`, and the spans with where the reference has its image tokens."""
    names = ("tower", "projected", "deepstack", "hidden", "means")
    with exact_model(files) as model:
        report.line("stages", *names, "spans")
        for case in STAGES:
            pictures = [make_picture(*size) for size in case.pictures]
            (prompt,) = (part for part in case.parts if isinstance(part, str))
            ours = lookonce.extract(model, pictures, prompt=prompt)
            tokens = reference.tokenize(reference.render(case.messages()), pictures)
            errors = _stage_errors(ours, reference, tokens, pictures)
            same = _image_spans(ours) == _image_runs(tokens, reference.image_token, ours.visual_token_lens)
            report.line(
                case.name,
                *(report.error(f"stages, {name}", error) for name, error in zip(names, errors, strict=True)),
                "equal" if same else "DIFFER",
                met=same and max(errors) <= _STAGE_ERROR,
            )


def _stage_errors(
    ours: Stages, reference: "Reference", tokens: list[int], pictures: Sequence[NDArray[np.uint8]]
) -> tuple[float, ...]:
    looked = [reference.look(picture) for picture in pictures]
    towers, rows = [tower for tower, _ in looked], np.concatenate([rows for _, rows in looked])
    states = reference.hidden_states(tokens, pictures)[-1]
    width = states.shape[-1]
    deepstack = np.stack(np.split(rows, rows.shape[1] // width, axis=1)[1:] or [rows[:, :0]])
    means = [
        relative_error(ours.vision_pooled_mean, np.stack([tower.mean(0) for tower in towers])),
        relative_error(ours.projected_pooled_mean, np.stack([part[:, :width].mean(0) for _, part in looked])),
        relative_error(ours.lm_pooled_mean, states.mean(0)[None]),
    ]
    return (
        relative_error(ours.vision_tokens, np.concatenate(towers)),
        relative_error(ours.projected_tokens, rows[:, :width]),
        relative_error(ours.deepstack_features, deepstack) if deepstack.size else float(ours.deepstack_features.size),
        relative_error(ours.lm_last_hidden, states[None]),
        max(means),
    )


def _image_spans(stages: Stages) -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in stages.spans if span.kind == "image"]


def _image_runs(tokens: Sequence[int], image_token: int, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where the image tokens of each picture stand, by their ids and the pictures' lengths."""
    places = [place for place, token in enumerate(tokens) if token == image_token]
    runs = []
    for length in lengths:
        run, places = places[:length], places[length:]
        runs.append((run[0], run[-1] + 1))
    return [] if places else runs
