"""What `lookonce doctor` finds out about this machine, this build, the models around and the store.

Knows nothing of how it is printed.
"""

import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import psutil

from lookonce import gguf_check, gguf_file, retype
from lookonce.byte_size import format_size
from lookonce.cards import ModelCard, readable_cards, split_name
from lookonce.drawing import draw_shape
from lookonce.errors import ModelFileError, StoreError
from lookonce.gguf_file import GgufFile
from lookonce.model_files import locate_card
from lookonce.model_folders import folder_problem, folders, repository_folders
from lookonce.store import Store
from lookonce.version import VERSION

if TYPE_CHECKING:
    from lookonce.model import Model

__all__ = [
    "FoundModel",
    "Machine",
    "Native",
    "Report",
    "SelfCheck",
    "StoreState",
    "check_lines",
    "check_model",
    "examine",
    "lines",
]

_LIBRARIES: Final = ("llama-cpp-python", "numpy", "pillow", "gguf", "safetensors", "torch")
_MOST_FILES: Final = 200
_ALIKE: Final = 0.99999  # a cosine above is rounding
_QUESTION: Final = "Describe the picture."  # in words that the model in the package was taught, too


@dataclass(frozen=True, slots=True)
class Machine:
    """The computer as its system describes it."""

    system: str
    cpu: str
    logical_cores: int
    memory_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Native:
    """The native build: the CPU features it uses, its threads by default, its devices.

    `problem` says why it cannot be used at all.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    threads: int = 0
    devices: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A GGUF file. `projector` is the file that fits a text model; `problem` says why a file cannot be used."""

    path: Path
    kind: Literal["text", "projector", "damaged"]
    name: str
    family: str
    size_bytes: int
    projector: Path | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreState:
    """The store; `problem` says why it cannot be used."""

    folder: Path
    entries: int
    size_bytes: int
    limit_bytes: int
    writable: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What a model answered about two drawn pictures, and about none; any two alike are a failure.

    `cosines` compares the vectors of the same three: first with second, first with none, second with none.
    """

    model: str
    first: str
    second: str
    none: str
    cosines: tuple[float, float, float]

    @property
    def answers_differ(self) -> bool:
        """Whether a picture changes the answer."""
        return len({self.first, self.second, self.none}) == 3

    @property
    def vectors_differ(self) -> bool:
        """Whether a picture changes the vector by more than rounding does."""
        return max(self.cosines) < _ALIKE

    @property
    def passed(self) -> bool:
        """Whether a picture changes both."""
        return self.answers_differ and self.vectors_differ


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found out; `check` only where a model was given."""

    versions: Mapping[str, str]
    machine: Machine
    native: Native
    models: tuple[FoundModel, ...]
    store: StoreState
    check: SelfCheck | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it, but for the paths."""
        found = asdict(self)
        if self.check is not None:
            for name in ("answers_differ", "vectors_differ", "passed"):
                found["check"][name] = getattr(self.check, name)
        return found


def examine(model: str | None, store: Path | None) -> Report:
    """Find out everything but what takes a loaded model."""
    return Report(
        find_versions(), describe_machine(), describe_native(), tuple(find_models(model)), describe_store(store)
    )


def lines(report: Report) -> Iterator[str]:
    """Give the report for people to read, without the check."""
    yield "Versions"
    yield from (f"  {name:<18}{version}" for name, version in report.versions.items())
    machine, native = report.machine, report.native
    yield "Machine"
    yield f"  {'system':<18}{machine.system}"
    yield f"  {'cpu':<18}{machine.cpu}, {machine.logical_cores} logical cores"
    yield f"  {'memory':<18}{format_size(machine.memory_bytes)}, {format_size(machine.available_bytes)} free"
    yield "Native library"
    if native.problem:
        yield f"  CANNOT BE USED: {native.problem}"
    else:
        yield f"  {'libllama':<18}{native.versions['libllama']}"
        yield from _wrapped("features used", native.features)
        yield f"  {'threads used':<18}{native.threads}"
        yield f"  {'devices':<18}{', '.join(native.devices)}"
    yield "Models"
    if problem := folder_problem():
        yield f"  {problem}"
    for model in report.models:
        yield from _model_lines(model)
    if not report.models:
        yield "  none found: give --model, or set LOOKONCE_MODEL or LOOKONCE_MODELS_DIR"
    yield "Store"
    yield from _store_lines(report.store)


def _wrapped(title: str, words: tuple[str, ...]) -> Iterator[str]:
    rows = textwrap.wrap(" ".join(words), 60) or ["-"]
    yield from (f"  {title if number == 0 else '':<18}{row}" for number, row in enumerate(rows))


def _model_lines(model: FoundModel) -> Iterator[str]:
    yield f"  {model.path}"
    if model.problem:
        yield f"    cannot be used: {model.problem}"
        return
    yield f"    {model.kind}, {model.family}, {model.name!r}, {format_size(model.size_bytes)}"
    if model.kind == "text":
        yield f"    projector: {model.projector.name if model.projector else 'none that fits, or several'}"


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def _store_lines(store: StoreState) -> Iterator[str]:
    if store.problem:
        yield f"  {store.problem}"
        return
    yield f"  {store.folder}{'' if store.writable else ' (cannot be written to)'}"
    yield f"  {_entries(store.entries)}, {format_size(store.size_bytes)} of at most {format_size(store.limit_bytes)}"


def check_lines(check: SelfCheck) -> Iterator[str]:
    """Give the check's findings for people to read."""
    yield f"Check of {check.model!r}: {'passed' if check.passed else 'FAILED'}"
    yield f"  red circle on white      {check.first.strip()!r}"
    yield f"  yellow square on black   {check.second.strip()!r}"
    yield f"  no picture               {check.none.strip()!r}"
    for pair, cosine in zip(("circle and square", "circle and none", "square and none"), check.cosines, strict=True):
        yield f"  {f'vectors of {pair}':<32} cosine {cosine:.6f}{'' if cosine < _ALIKE else ': alike'}"
    if not check.passed:
        what = " and ".join(
            name for name, differ in (("answer", check.answers_differ), ("vector", check.vectors_differ)) if not differ
        )
        yield f"  A picture does not change the {what}: is the projector file the one published with the model?"


def find_versions() -> dict[str, str]:
    """Versions of lookonce, Python and the libraries that count."""
    found = {"lookonce": VERSION, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_machine() -> Machine:
    """Look at the CPU and the memory."""
    memory = psutil.virtual_memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        logical_cores=psutil.cpu_count() or 1,
        memory_bytes=memory.total,
        available_bytes=memory.available,
    )


def describe_native() -> Native:
    """Load the native library and ask it about itself."""
    try:
        from lookonce.engine import physical_cores
        from lookonce.native.library import cpu_features, gpus, versions
    except Exception as error:  # noqa: BLE001  a broken build fails in many ways, and telling so is the purpose
        return Native(problem=f"{type(error).__name__}: {error}")
    return Native(
        versions=versions(),
        features=cpu_features(),
        threads=physical_cores(),
        devices=("cpu", *(f"{gpu.name} ({gpu.description})" for gpu in gpus())),
    )


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_models(named: str | None) -> list[FoundModel]:
    """The GGUF files of the named model's folder, the folders of models, the hubs' caches and the current folder.

    Each folder and the folders in it are searched, no deeper; of the hubs' caches those that cards tell of.
    """
    cards = readable_cards()
    cached = [folder for card in cards.values() for folder in repository_folders(card)]
    searched = [*([_folder_of(named, cards)] if named else []), *folders(), Path.cwd(), *cached]
    found: dict[Path, Path] = {}
    for path in (path for folder in searched for path in _ggufs(folder)):
        found.setdefault(path.resolve(), path.absolute())  # in a cache only a link tells a file's name
    read = [_read(path) for path in islice(found.values(), _MOST_FILES)]
    projectors = [
        one
        for one in read
        if isinstance(one, GgufFile) and gguf_check.family(one) and retype.origin(one) is None and _is_sound(one)
    ]
    return [one if isinstance(one, FoundModel) else _describe(one, projectors) for one in read]


def _folder_of(named: str, cards: Mapping[str, ModelCard]) -> Path:
    card = cards.get(split_name(named)[0].lower())
    text = None if card is None else locate_card(card).text
    path = Path(named).expanduser() if text is None else text
    return path if path.is_dir() else path.parent


def _ggufs(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(folder.glob("*.gguf"))
        yield from sorted(folder.glob("*/*.gguf"))


def _read(path: Path) -> GgufFile | FoundModel:
    try:
        return gguf_file.read(path)
    except ModelFileError as error:
        return FoundModel(path, "damaged", path.stem, "", 0, problem=str(error))


def _is_sound(projector: GgufFile) -> bool:
    with suppress(ModelFileError):
        gguf_check.check_projector(projector)
        return True
    return False


def _describe(gguf: GgufFile, projectors: list[GgufFile]) -> FoundModel:
    projector = gguf.architecture == "clip"
    family = gguf_check.family(gguf) if projector else gguf.architecture
    try:
        if projector:
            gguf_check.check_projector(gguf)
        else:
            gguf_check.check_text_model(gguf)
    except ModelFileError as error:
        return FoundModel(gguf.path, "damaged", gguf.name, family, gguf.size_bytes, problem=str(error))
    if projector:
        return FoundModel(gguf.path, "projector", gguf.name, family, gguf.size_bytes)
    fitting = [one.path for one in projectors if one.path.parent == gguf.path.parent and _fits(gguf, one)]
    return FoundModel(gguf.path, "text", gguf.name, family, gguf.size_bytes, fitting[0] if len(fitting) == 1 else None)


def _fits(text: GgufFile, projector: GgufFile) -> bool:
    with suppress(ModelFileError):
        gguf_check.check_pair(text, projector)
        return True
    return False


def describe_store(folder: Path | None) -> StoreState:
    """Count the store and see whether it could be written to, without writing."""
    try:
        with Store(folder) as store:
            stats = store.stats()
    except StoreError as error:
        return StoreState(folder or Path(), 0, 0, 0, writable=False, problem=str(error))
    existing = next(path for path in (stats.folder.absolute(), *stats.folder.absolute().parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    return StoreState(stats.folder, stats.entries, stats.size_bytes, stats.limit_bytes, writable)


def check_model(load: "Callable[[], Model]") -> SelfCheck:
    """Ask a model the same about two drawn pictures and about none, and make a vector of each.

    A picture that changes nothing is the commonest silent fault of a wrong projector file.
    """
    from lookonce.embedder import Embedder

    pictures = (draw_shape("circle", "red", "white"), draw_shape("square", "yellow", "black"))
    with load() as model:
        first, second, without = (
            model.ask(_QUESTION, images=images, temperature=0.0, max_tokens=32).text
            for images in ([pictures[0]], [pictures[1]], [])
        )
        with Embedder(model) as embedder:
            a, b = (embedder.embed_multimodal(_QUESTION, picture) for picture in pictures)
            none = embedder.embed_text(_QUESTION)
        return SelfCheck(model.name, first, second, without, (float(a @ b), float(a @ none), float(b @ none)))
