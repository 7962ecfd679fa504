"""Which type of a projector file is the fastest on this CPU, found out by a short measurement.

The projector is cut down to its first blocks, once for each type, and these take turns at one picture. Also compares
what two projector files make of a picture. Needs no text model: a small one of random weights stands in for it.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from lookonce import gguf_check, gguf_file
from lookonce.drawing import draw_scene
from lookonce.errors import InputError
from lookonce.gguf_file import GgufFile
from lookonce.gguf_rewrite import NewTensor, booleans, rewrite, u32
from lookonce.gguf_type import converter_type
from lookonce.native.library import cpu_features
from lookonce.native.text import TextModel
from lookonce.native.vision import VisionTower
from lookonce.retype import TYPES, projector_type
from lookonce.synthetic.gguf_pair import write_text
from lookonce.synthetic.shape import TextShape, find_shape
from lookonce.synthetic.vocabulary import build_vocabulary
from lookonce.synthetic.weight import Weights

__all__ = ["Choice", "choose_type", "compare", "measure_types", "pick"]

LEAST_GAIN: Final = 1.08  # another type has to be so many times as fast as the own one: less is noise
_BLOCKS: Final = 2
_ROUNDS: Final = 4
_FEATURES: Final = ("AVX512_BF16", "AMX_INT8", "AMX_BF16", "AVX512_VNNI", "AVX_VNNI", "AVX512_FP16", "FP16_VA")
_VOCABULARY: Final = 512


@dataclass(frozen=True, slots=True)
class Choice:
    """The type to use: `own` is the file's, `times_s` the least of each type's times for the part of the tower that was
    measured, `features` what the native build uses of this CPU that counts for them."""

    type: str
    own: str
    times_s: Mapping[str, float]
    features: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why, in one sentence."""
        times = ", ".join(f"{kind} {seconds * 1000:.0f} ms" for kind, seconds in self.times_s.items())
        having = ", ".join(self.features) or "none of the matrix instructions"
        gain = self.times_s[self.own] / self.times_s[self.type]
        verdict = f"{self.type} is {gain:.2f} times as fast as {self.own}"
        if self.type == self.own:
            verdict = f"nothing is faster than {self.own}, its own type, by more than {LEAST_GAIN - 1:.0%}"
        return f"{verdict} (the first blocks with a picture of 512 x 512: {times}; the CPU and the build have {having})"


def choose_type(
    projector: GgufFile, *, threads: int, advance: Callable[[int, int], object] = lambda *_: None
) -> Choice:
    """Measure the types, the file's own among them, and choose.

    The own type stays unless another is faster by more than the noise. Raises NativeError where the native library
    fails, InputError for values that a type cannot hold and where the temporary folder is full.
    """
    own = projector_type(projector)
    try:
        times = measure_types(projector, list(dict.fromkeys((own, *TYPES))), threads=threads, advance=advance)
    except OSError as error:
        raise InputError(
            f"the temporary folder {tempfile.gettempdir()} cannot be written ({error.strerror or error}): make room "
            "there, set TMPDIR to another, or give the type"
        ) from error
    return pick(own, {kind: min(found) for kind, found in times.items()}, _features())


def pick(own: str, times_s: Mapping[str, float], features: Sequence[str] = ()) -> Choice:
    """The choice that measured times lead to."""
    fastest = min(times_s, key=lambda kind: times_s[kind])
    chosen = fastest if times_s[own] > LEAST_GAIN * times_s[fastest] else own
    return Choice(chosen, own, dict(times_s), tuple(features))


def measure_types(
    projector: GgufFile,
    kinds: Sequence[str],
    *,
    threads: int,
    rounds: int = _ROUNDS,
    advance: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, list[float]]:
    """Seconds that the first blocks of the tower and its projector take for a picture, by type, in alternating turns.

    One turn more, the first, is not counted.
    """
    picture = _test_picture(512, 512, projector)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    done, total = 0, len(kinds) * (rounds + 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lookonce-retype-")))
        text = stack.enter_context(_stand_in(projector, folder))
        towers: dict[str, VisionTower] = {}
        for kind in kinds:
            path = folder / f"{kind}.gguf"
            _write_cut(projector, path, kind)
            towers[kind] = stack.enter_context(VisionTower(path, text, threads=threads))
            path.unlink()  # the tower has its own copy
        for turn in range(rounds + 1):
            order = list(towers.items())
            for kind, tower in order if turn % 2 else reversed(order):
                started = time.perf_counter()
                tower.encode(picture)
                if turn:
                    times[kind].append(time.perf_counter() - started)
                done += 1
                advance(done, total)
    return times


def compare(first: Path, second: Path, *, threads: int) -> float:
    """The lowest cosine between the rows that two projector files of one model make of a drawn picture."""
    looks: list[NDArray[np.float64]] = []
    projector = gguf_file.read(first)
    picture = _test_picture(480, 320, projector)
    with tempfile.TemporaryDirectory(prefix="lookonce-retype-") as folder, _stand_in(projector, Path(folder)) as text:
        for path in (first, second):
            with VisionTower(path, text, threads=threads) as tower:
                looks.append(tower.encode(picture).rows.astype(np.float64))
    ours, theirs = looks
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / norms).min())


def _features() -> tuple[str, ...]:
    having = cpu_features()
    return tuple(feature for feature in _FEATURES if feature in having)


def _test_picture(width: int, height: int, projector: GgufFile) -> NDArray[np.uint8]:
    """Drawn shapes, of a size near the given one that the tower takes as it is."""
    patch = projector.metadata["clip.vision.patch_size"]
    factor = 2 * patch if isinstance(patch, int) else 32
    size = (round(width / factor) * factor, round(height / factor) * factor)
    return np.asarray(draw_scene().resize(size))


@contextmanager
def _stand_in(projector: GgufFile, folder: Path) -> Iterator[TextModel]:
    """A text model that takes the projector's rows: libmtmd loads no tower without one."""
    branches = _branches(projector)
    qwen3 = gguf_check.family(projector) == "qwen3vl"
    width = int(str(projector.metadata["clip.vision.projection_dim"]))
    # Without a key_length llama.cpp takes the width divided by the heads.
    heads, head = (1, 64) if qwen3 else (max(1, width // 64), 64)
    shape = find_shape("qwen3vl" if qwen3 else "qwen2.5vl", "tiny")
    sections = (12, 10, 10) if qwen3 else (8, 12, 12)
    layers = max(1, len(branches))
    small = TextShape(width, layers, heads, 1, head, 32, sections, 1e6, _VOCABULARY, 4096, tied=True)
    # Only the number of the branches is read of the vision shape.
    stand_in = replace(shape, text=small, vision=replace(shape.vision, deepstack=tuple(range(len(branches)))))
    path = folder / "text.gguf"
    weights = Weights(stand_in, seed=0)
    write_text(path, stand_in, weights, build_vocabulary(shape.family, _VOCABULARY), type="F16", name="Stand-in")
    with TextModel(path) as text:
        yield text


def _branches(projector: GgufFile) -> list[int]:
    """The blocks that have a DeepStack branch: their number makes the width of a row."""
    found = {int(name.split(".")[2]) for name in projector.tensors if name.startswith("v.deepstack.")}
    return sorted(found)


def _write_cut(projector: GgufFile, path: Path, kind: str) -> None:
    """Write the projector with its first blocks only, in one type.

    Every DeepStack branch stays, moved to one of these blocks: without all of them a row would have another width.
    """
    branches = _branches(projector)
    blocks = max(_BLOCKS, len(branches))
    values = {"clip.vision.block_count": u32(blocks)}
    if "clip.vision.is_deepstack_layers" in projector.metadata:
        values["clip.vision.is_deepstack_layers"] = booleans([block < len(branches) for block in range(blocks)])
    tensors = []
    for info in projector.tensors.values():
        parts = info.name.split(".")
        if parts[:2] == ["v", "blk"] and int(parts[2]) >= blocks:
            continue
        if parts[:2] == ["v", "deepstack"]:
            parts[2] = str(branches.index(int(parts[2])))
        same = kind == projector_type(projector) or len(info.shape) == 1
        chosen = GgmlType[info.type] if same else converter_type(info.name, len(info.shape), info.shape[0], kind)
        tensors.append(NewTensor(info, ".".join(parts), chosen))
    with path.open("wb") as file:
        rewrite(projector, file, values, tensors)
