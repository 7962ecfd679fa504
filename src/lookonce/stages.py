"""The tensors at each stage of the pipeline: tower, projector, text model; and the files they are written to."""

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lookonce.durable import write_durably
from lookonce.embedding import ImageEmbedding
from lookonce.engine import Engine
from lookonce.errors import InputError, NativeError, PromptError
from lookonce.images import PictureSource
from lookonce.looker import LookOptions, PendingLook
from lookonce.model import Model
from lookonce.native.hidden import layer_tensor
from lookonce.pooling import check_finite
from lookonce.prompt import Message, Prompt, TokenRun, count
from lookonce.states import StateRunner, check_room

DEFAULT_PROMPT: Final = "Describe the image."
_TOKEN_TENSORS: Final = (
    "vision_tokens", "projected_tokens", "deepstack_features", "lm_last_hidden", "lm_image_hidden"
)  # fmt: skip
_TENSOR_FILE: Final = re.compile("|".join((*_TOKEN_TENSORS, r"vision_layer_\d+")))

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Which rows of `lm_last_hidden` belong together: `start` to before `stop`; `image` counts the pictures from 0."""

    kind: Literal["system", "text", "image"]
    start: int
    stop: int
    image: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """What one prompt with its pictures became at each stage, all F32.

    vision_tokens: the tower's output before the projector, (Nv, Cv), the pictures' one after the other, as
        transformers' `last_hidden_state` has it: for Qwen3-VL four patches in a row become one projected token; the
        patches of Qwen2.5-VL stand in the order of its attention windows.
    vision_layers: the outputs of the layers that were asked for, (Nv, Cv) each.
    projected_tokens: the projector's output, (N, D).
    deepstack_features: what DeepStack adds in the text model's first layers, (layers, N, D).
    lm_last_hidden: the text model's states, (1, T, D): after the final norm, or the layer that was asked for.
    visual_token_lens: how many of the N rows each picture has.
    spans: which rows of `lm_last_hidden` are system, text and pictures.
    """

    model_name: str
    prompt: str
    layer: int
    pictures: tuple[str, ...]
    vision_tokens: Array
    vision_layers: Mapping[int, Array]
    projected_tokens: Array
    deepstack_features: Array
    lm_last_hidden: Array
    visual_token_lens: tuple[int, ...]
    vision_token_lens: tuple[int, ...]
    spans: tuple[TokenSpan, ...]

    @property
    def vision_pooled_mean(self) -> Array:
        """Mean of each picture's vision tokens, (pictures, Cv)."""
        return _means(self.vision_tokens, self.vision_token_lens)

    @property
    def projected_pooled_mean(self) -> Array:
        """Mean of each picture's projected tokens, (pictures, D)."""
        return _means(self.projected_tokens, self.visual_token_lens)

    @property
    def lm_pooled_mean(self) -> Array:
        """Mean of all hidden states, (1, D)."""
        return np.asarray(self.lm_last_hidden.mean(axis=1, dtype=np.float64), dtype=np.float32)

    @property
    def lm_image_hidden(self) -> Array:
        """The hidden states of the image rows alone, (N, D)."""
        return np.concatenate([self.lm_last_hidden[0, s.start : s.stop] for s in self.spans if s.kind == "image"])

    def save(self, folder: str | PathLike[str], *, tokens: bool = True) -> Path:
        """Write `.npy` files and `manifest.json` into a folder, made if missing; without `tokens` only the means.

        Give the manifest's path. Raises InputError where the folder cannot be written.
        """
        folder = Path(folder)
        arrays: dict[str, Array] = {
            "vision_pooled_mean": self.vision_pooled_mean,
            "projected_pooled_mean": self.projected_pooled_mean,
            "lm_pooled_mean": self.lm_pooled_mean,
        }
        if tokens:
            arrays |= {name: getattr(self, name) for name in _TOKEN_TENSORS if getattr(self, name).size}
            arrays |= {f"vision_layer_{number}": values for number, values in self.vision_layers.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            manifest = folder / "manifest.json"
            manifest.unlink(missing_ok=True)
            for stale in folder.glob("*.npy"):  # of an earlier run with other layers or more tensors
                if _TENSOR_FILE.fullmatch(stale.stem) and stale.stem not in arrays:
                    stale.unlink()
            for name, values in arrays.items():
                _write_array(folder / f"{name}.npy", values)
            # Last, so that a folder with a manifest is whole.
            write_durably(manifest, json.dumps(self._manifest(arrays), ensure_ascii=False, indent=2).encode())
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
        return manifest

    def _manifest(self, arrays: Mapping[str, Array]) -> dict[str, object]:
        spans = [
            {"kind": span.kind, "start": span.start, "stop": span.stop}
            | ({} if span.image is None else {"image": span.image})
            for span in self.spans
        ]
        return {
            "format_version": 1,
            "model": self.model_name,
            "pictures": list(self.pictures),
            "prompt": self.prompt,
            "layer": self.layer,
            "visual_token_lens": list(self.visual_token_lens),
            "token_spans": spans,
            "tensors": {
                name: {"file": f"{name}.npy", "shape": list(values.shape), "dtype": str(values.dtype)}
                for name, values in arrays.items()
            },
        }


def extract(
    model: Model,
    pictures: PictureSource | Sequence[PictureSource],
    *,
    prompt: str = DEFAULT_PROMPT,
    layer: int = -1,
    vision_layers: Iterable[int] = (),
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Stages:
    """Take a prompt with a picture, or with several at once, through the pipeline and keep every stage.

    layer: whose output `lm_last_hidden` is; -1 is the last, after the final norm.
    vision_layers: layers of the tower, by number, whose output is wanted too.

    The tower runs in any case, as no stored look holds what comes before the projector. Raises what `Model.look`
    raises, InputError for a layer that the model lacks, ContextError where the prompt does not fit.
    """
    sources = _listed(pictures)
    if not sources:
        raise InputError("there is no picture to extract from: give at least one")
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f"the prompt is {prompt!r}: give a text")
    engine = model.engine
    number, _ = layer_tensor(engine.text, layer)
    wanted = _checked_layers(engine.looker.tower_depth, vision_layers)
    options = LookOptions(min_pixels, max_pixels, "f32")
    pending = _prepared(engine, sources, options, prompt)
    looked = [_look(engine, one, wanted) for one in pending]
    looks = [look for look, _ in looked]
    whole = engine.prompt([Message("user", (*looks, prompt))])
    check_room(whole.n_tokens, whole.n_rows, engine.n_ctx, "shorten it")
    states = _states(engine, whole, layer)
    width = engine.text.width
    rows = np.concatenate([np.asarray(look.rows, dtype=np.float32) for look in looks])
    last = engine.looker.tower_depth - 1
    seen = {one: np.concatenate([found[one] for _, found in looked]) for one in (*wanted, last)}
    return Stages(
        model_name=engine.name,
        prompt=prompt,
        layer=number,
        pictures=tuple(map(_name, sources)),
        vision_tokens=seen[last],
        vision_layers={one: seen[one] for one in wanted},
        projected_tokens=rows[:, :width],
        deepstack_features=rows[:, width:].reshape(len(rows), -1, width).transpose(1, 0, 2),
        lm_last_hidden=states[None],
        visual_token_lens=tuple(look.n_rows for look in looks),
        vision_token_lens=tuple(len(found[last]) for _, found in looked),
        spans=tuple(_spans(whole, _system_tokens(engine))),
    )


def _prepared(engine: Engine, sources: Sequence[PictureSource], options: LookOptions, prompt: str) -> list[PendingLook]:
    """The pictures made ready for the tower, which is not to work for a prompt that does not fit."""
    pending = [engine.looker.prepare_anew(source, options) for source in sources]
    parts = engine.template.render([Message("user", (*pending, prompt))])
    check_room(*count(parts, engine.text.tokenize), engine.n_ctx, "shorten it")
    return pending


def _states(engine: Engine, prompt: Prompt, layer: int) -> Array:
    runner = StateRunner(engine, layer)
    try:
        (states,) = runner.run([prompt], [np.ones(prompt.n_tokens + prompt.n_rows, dtype=np.bool_)])
        return states
    finally:
        runner.close()


def _listed(pictures: PictureSource | Sequence[PictureSource]) -> list[PictureSource]:
    if isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes):
        return list(pictures)
    return [pictures]


def _name(source: PictureSource) -> str:
    return str(source) if isinstance(source, str | PathLike) else type(source).__name__


def _checked_layers(depth: int, layers: object) -> tuple[int, ...]:
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise InputError(f"vision_layers is {layers!r}: give a list of whole numbers from 0 to {depth - 1}")
    wanted = tuple(layers)
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
            raise InputError(f"vision layer {layer!r} does not exist: the tower has 0 to {depth - 1}")
    return wanted


def _look(engine: Engine, pending: PendingLook, layers: Sequence[int]) -> tuple[ImageEmbedding, dict[int, Array]]:
    """A picture's look, with the outputs of `layers` and of the tower's last layer."""
    names = {layer: f"layer_out-{layer}" for layer in (*layers, engine.looker.tower_depth - 1)}
    look, tensors = engine.looker.finish_with(pending, frozenset(names.values()))
    if missing := set(names.values()) - set(tensors):
        raise NativeError(f"llama.cpp shows no {min(missing)} of this tower: its architecture gives no vision tokens")
    return look, {layer: check_finite(tensors[name], engine.name) for layer, name in names.items()}


def _spans(prompt: Prompt, n_system: int) -> list[TokenSpan]:
    """The prompt's cells by what they are; what the template writes before the user's input counts as system."""
    spans = [TokenSpan("system", 0, n_system)]
    end, image = 0, -1
    for run in prompt.runs:
        start = max(end, n_system)
        if isinstance(run, TokenRun):
            end += len(run.tokens)
            spans.append(TokenSpan("text", start, end))
            continue
        end += run.stop - run.start
        image += run.start == 0
        if run.start and spans[-1].kind == "image":  # more of the same picture
            spans[-1] = replace(spans[-1], stop=end)
        else:
            spans.append(TokenSpan("image", start, end, image))
    return [span for span in spans if span.start < span.stop]


def _system_tokens(engine: Engine) -> int:
    """How many tokens stand before the user's input."""
    mark = "\ue000"
    before = "".join(map(str, engine.template.render([Message("user", (mark,))]))).partition(mark)[0]
    return engine.plain_prompt([before]).n_tokens if before else 0


def _means(tokens: Array, lengths: Sequence[int]) -> Array:
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return np.stack([part.mean(axis=0, dtype=np.float64) for part in parts]).astype(np.float32)


def _write_array(path: Path, values: Array) -> None:
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    write_durably(path, data.getvalue())
