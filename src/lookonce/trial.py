"""Loads a model in a child process first, where llama.cpp can die without taking the caller along.

What the header check cannot see, a vocabulary or a hyper-parameter that trips an assert deep in native code, ends the
child with a signal and the caller with a ModelFileError. A model is tried once for each version of the native library,
which the store remembers; what no store remembers is tried at every load. Files whose content is the one that a hub
publishes for the model's card are not tried. The child maps the text model, so its pages are those that the caller will
use; it evaluates one token and one small picture, and lets go of everything.

The child is this module too: `run_child` is what it runs.
"""

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from lookonce import gguf_check, published
from lookonce.cards import ModelCard
from lookonce.errors import LookonceError, ModelFileError, NativeError
from lookonce.fingerprint import Fingerprint, recall
from lookonce.gguf_file import GgufFile
from lookonce.model_files import ModelFiles
from lookonce.native.library import versions
from lookonce.native.text import Context, ContextOptions, TextModel
from lookonce.native.vision import VisionTower
from lookonce.store import Store

__all__ = ["run_child", "try_model"]

logger = logging.getLogger(__name__)

_KIND: Final = "trial"
_SOUND: Final = "sound"
# Run in Python's isolated mode, in which the present folder's modules are not imported, with the caller's own search
# path, as `multiprocessing` hands it on: PYTHONPATH alone does not tell what was added since.
_CHILD: Final = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from lookonce.trial import run_child; run_child(given)"
)
# Set in the child, which tries nothing itself, be it an application that takes the place of Python.
_IN_TRIAL: Final = "LOOKONCE_IN_TRIAL"
# What llama.cpp dies of; any other signal comes from outside.
_DEATHS: Final = frozenset({"SIGABRT", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGTRAP", "SIGSYS"})
_LEAST_S: Final = 30.0
_BYTES_A_SECOND: Final = 20e6  # of a slow network disk
_SMALL_PICTURES: Final = ("qwen3vl", "qwen2.5vl", "qwen2vl")  # families that take them; others size them up themselves
_SIDE: Final = 64  # pixels: four tokens
_CELLS: Final = 64
_SOURCE_FOLDER: Final = re.compile(r"(?:/[^/\s:]+)+/(?=[^/\s:]+:\d+:)")  # of whoever compiled the library


def try_model(files: ModelFiles, store: Store | None) -> None:
    """Load the files in a child process, unless they are known to load or are a card's own.

    Raises ModelFileError where the child dies of a signal, does not end, or refuses the files, and where they change
    meanwhile. Where no child can be started the trial is left out, with a line in the log.
    """
    if os.environ.get(_IN_TRIAL):
        return
    parts = [files.text, *([files.projector] if files.projector else [])]
    # To read a file through costs more than the trial that it may spare, where nothing can be remembered.
    contents = [Fingerprint(gguf, store) for gguf in parts]
    prints = [content.known() if store is None else content.value() for content in contents]
    told = _published_hashes(files.card)
    if all(gguf.path in files.verified or content in told for gguf, content in zip(parts, prints, strict=True)):
        return
    digest = hashlib.sha256(json.dumps([*prints, versions()], sort_keys=True).encode()).hexdigest()
    if all(prints) and recall(_KIND, digest, store) == _SOUND:
        return
    loaded = _try_in_child(files, parts)
    for content in contents:
        content.check_unchanged()
    if loaded and store is not None:
        store.remember(_KIND, digest, _SOUND)


def _published_hashes(card: ModelCard | None) -> set[str | None]:
    if card is None:
        return set()
    files = (published.complete(card, file) for file in (*card.text.values(), *card.projector.values()))
    return {file.sha256 for file in files} - {None}


def _try_in_child(files: ModelFiles, parts: list[GgufFile]) -> bool:
    """Whether the child loaded them; False where it could not even begin."""
    if not sys.executable or getattr(sys, "frozen", False):  # an application that has Python in it
        logger.info("no trial of %s: there is no Python interpreter to run it", files.text.path)
        return False
    limit_s = _LEAST_S + sum(gguf.size_bytes for gguf in parts) / _BYTES_A_SECOND
    # Not the present folder, which "" stands for; ours is there even if that is what it was found by.
    path = [*filter(None, sys.path), str(Path(__file__).resolve().parent.parent)]
    given: dict[str, Any] = {"path": path, "text": str(files.text.path), "projector": None}
    if files.projector is not None:
        given |= {"projector": str(files.projector.path), "family": gguf_check.family(files.projector)}
    try:
        ended = subprocess.run(  # noqa: S603  this interpreter, with our own code
            [sys.executable, "-I", "-c", _CHILD, json.dumps(given)],
            capture_output=True,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": "", _IN_TRIAL: "1"},
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        late = _stage(error.stdout) or files.text.path
        raise ModelFileError(
            f"{late} was not loaded within {limit_s:.0f} s in a trial: the file is damaged or this machine is busy; "
            "load it with trial=False if you trust it"
        ) from error
    except (OSError, ValueError) as error:  # no interpreter of its own, as in an embedded one; no process to be had
        logger.info("no trial of %s: %s", files.text.path, error)
        return False
    return _judge(ended, files.text.path)


def _judge(ended: "subprocess.CompletedProcess[bytes]", text: Path) -> bool:
    told = _told(ended.stdout)
    if ended.returncode == 0 and told[-1:] == [{"result": _SOUND}]:
        return True
    if told and "refused" in told[-1]:
        raise ModelFileError(str(told[-1]["refused"]))
    path, said = _stage(ended.stdout), _last_words(ended.stderr)
    if ended.returncode < 0:
        raise ModelFileError(_of_signal(path or str(text), _signal(-ended.returncode), said))
    if path is not None:  # as on Windows, where a crash has a status like any other
        raise ModelFileError(
            f"{path} cannot be used, a trial load of it ended with status {ended.returncode} ({said}): download it "
            "again, convert it with the llama.cpp that is to read it, or load it with trial=False if you trust it"
        )
    logger.warning("no trial of %s: the child ended with %d: %s", text, ended.returncode, said)
    return False


def _of_signal(path: str, name: str, said: str) -> str:
    if name in _DEATHS:
        return (
            f"{path} cannot be used, llama.cpp died of {name} in a trial load ({said}): download it again, or convert "
            "it with the llama.cpp that is to read it"
        )
    if name == "SIGILL":
        return (
            f"{path} cannot be loaded, llama.cpp died of SIGILL in a trial load ({said}): it was built for another "
            "CPU, so install llama-cpp-python anew, built for this one"
        )
    if name == "SIGKILL":
        return (
            f"{path} was not loaded, its trial load was ended by SIGKILL, as the system does where memory runs out: "
            "free some, or take a smaller model"
        )
    return f"{path} was not loaded, its trial load was ended by {name} from outside: load it again"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal, say
        return f"signal {number}"


def _told(output: bytes | None) -> list[dict[str, Any]]:
    lines = []
    for line in (output or b"").splitlines():
        with suppress(ValueError):
            if isinstance(said := json.loads(line), dict):
                lines.append(said)
    return lines


def _stage(output: bytes | None) -> str | None:
    """The file that the child was busy with; None where it had not begun."""
    return next((str(line["file"]) for line in reversed(_told(output)) if "file" in line), None)


def _last_words(errors: bytes) -> str:
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if "ASSERT" in line or "what():" in line]
    said = (telling or lines or ["it said nothing"])[-1]
    return _SOURCE_FOLDER.sub("", said)[:300]


def run_child(given: dict[str, Any]) -> None:
    """Load what the caller named, and say on standard output how far it came."""
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        _load(Path(given["text"]), Path(given["projector"]) if given["projector"] else None, given.get("family", ""))
    except NativeError as error:
        _tell(refused=f"{given['text']} cannot be used: {error}")
        sys.exit(1)
    except LookonceError as error:
        _tell(refused=str(error))
        sys.exit(1)
    _tell(result=_SOUND)


def _tell(**facts: str) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _load(text: Path, projector: Path | None, family: str) -> None:
    _tell(file=str(text))
    # Weights repacked for this CPU would be a second copy of them; mapped they are the caller's pages too.
    with TextModel(text, repack=False) as model:
        cells = min(_CELLS, model.context_length)
        with Context(model, ContextOptions(n_ctx=cells, threads=1)) as context:
            context.decode_tokens([0], position=0)
            context.logits()
        if projector is not None:
            _tell(file=str(projector))
            sized = family in _SMALL_PICTURES
            with VisionTower(projector, model, threads=1, exact_size=sized) as tower:
                if not sized:
                    return
                rows = tower.encode(np.full((_SIDE, _SIDE, 3), 128, dtype=np.uint8)).rows
            if not np.isfinite(rows).all():
                raise NativeError(f"{projector} gave rows that are not numbers: the file is damaged, fetch it again")
