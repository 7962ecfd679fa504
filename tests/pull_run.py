"""Runs `lookonce pull` in a process of its own: the hubs' clients read their environment when they are imported."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = "Owner/Tiny-VL-GGUF"
TEXT, PROJECTOR = "Tiny-VL-Q4_K_M.gguf", "mmproj-Tiny-VL-F16.gguf"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def dead_url() -> str:
    """An address on which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def card_text(name: str, text: tuple[str, bytes], projector: tuple[str, bytes], *, hashes: bool = True) -> str:
    """A card of the two files on both hubs, as models.toml has them."""

    def told(file: tuple[str, bytes]) -> str:
        known = f', size_bytes = {len(file[1])}, sha256 = "{sha256(file[1])}"' if hashes else ""
        return f'{{ file = "{file[0]}"{known} }}'

    return (
        f'["{name}"]\nfamily = "qwen3vl"\nlicence = "MIT"\n'
        f'huggingface = "{REPOSITORY}"\nmodelscope = "{REPOSITORY}"\n'
        f'text = {{ Q4_K_M = {told(text)}, Q8_0 = {{ file = "none.gguf" }} }}\n'
        f"projector = {{ F16 = {told(projector)} }}\n"
    )


@dataclass
class Place:
    """A user's home, with a card called tiny; the hubs are where nobody listens until told otherwise."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        others = ("HF_", "MODELSCOPE_", "LOOKONCE_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        self.environment = kept | {
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_DATA_HOME": str(self.home / "data"),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "HF_HOME": str(self.hf_home),
            "HF_ENDPOINT": dead_url(),
            "MODELSCOPE_CACHE": str(self.modelscope_cache),
            "MODELSCOPE_ENDPOINT": dead_url(),
            "LOOKONCE_MODELS": str(self.cards),
            "COLUMNS": "80",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    @property
    def hf_home(self) -> Path:
        return self.home / "hf"

    @property
    def modelscope_cache(self) -> Path:
        return self.home / "ms"

    @property
    def cards(self) -> Path:
        return self.home / "models.toml"

    @property
    def partials(self) -> list[Path]:
        return sorted(self.home.rglob("*.incomplete"))

    @property
    def models(self) -> list[Path]:
        """Every file that a search for models would find."""
        return sorted(self.home.rglob("*.gguf"))

    def start(
        self, *arguments: object, program: tuple[str, ...] = ("-m", "lookonce", "pull")
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            cwd=self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **options: Any) -> "Run":
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return Run(process.returncode, out, err)

    def pull(self, *arguments: object) -> Mapping[str, Any]:
        """A pull that goes well; what it says about the two files."""
        run = self.run("tiny", "--json", *arguments)
        assert (run.status, run.err) == (0, ""), run
        told = json.loads(run.out)
        assert run.out.count("\n") == 1
        return dict(told)

    def refused(self, *arguments: object, status: int = 1) -> str:
        """A pull that fails, with one line on stderr and nothing on stdout."""
        run = self.run("tiny", *arguments)
        assert (run.status, run.out, run.err.count("\n")) == (status, "", 1), run
        assert run.err.startswith("lookonce: ")
        return run.err


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str
