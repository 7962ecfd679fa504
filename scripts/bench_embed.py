"""Time vectors: Lookonce against llama-cpp-python's `Llama.embed` and against transformers in BF16.

Every measurement is a process of its own, the peers take turns, and the ratios are those of one round each, so that
a machine that is slow for a while slows all of them. transformers takes part where the `parity` extra is installed.

    python scripts/bench_embed.py --quick
    python scripts/bench_embed.py --model model.gguf --mmproj mmproj.gguf --case short --peer llama-cpp-python
"""

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lookonce
from bench_peer import PEERS, REFERENCE, Job, Measured, make_pictures
from lookonce.engine import physical_cores
from lookonce.prompt import TokenRun
from make_model import make_pair

__all__ = ["CASES", "Case"]

_WORDS = ("a", "the", "red", "green", "cat", "dog", "circle", "square", "picture", "of", "two", "left", "above", "What")


@dataclass(frozen=True, slots=True)
class Case:
    """What is embedded: how many texts of how many tokens on average, or pictures of which size."""

    name: str
    count: int
    quick_count: int
    tokens: int = 0
    size: tuple[int, int] = (0, 0)
    seen: bool = False

    @property
    def peers(self) -> tuple[str, ...]:
        """Who can do it: `Llama.embed` takes no pictures, and nobody else keeps what was seen."""
        if self.seen:
            return ("lookonce",)
        return ("lookonce", REFERENCE) if self.size[0] else tuple(PEERS)


CASES = (
    Case("short", 256, 64, tokens=10),
    Case("long", 32, 4, tokens=512),
    Case("pictures of 256", 16, 2, size=(512, 512)),
    Case("pictures of 56", 16, 4, size=(256, 224)),
    Case("pictures of 256, seen", 16, 2, size=(512, 512), seen=True),
)


def make_texts(model: lookonce.Model, case: Case, count: int) -> tuple[list[str], list[list[int]]]:
    """Texts of about the case's length in tokens, and the ids of their prompts."""
    draw = random.Random(0)
    texts: list[str] = []
    tokenize = model.engine.text.tokenize
    for _ in range(count):
        wanted = draw.randint(case.tokens // 2, case.tokens * 3 // 2) if case.tokens < 100 else case.tokens
        words = [draw.choice(_WORDS)]
        while len(tokenize(" ".join(words))) < wanted:
            words.append(draw.choice(_WORDS))
        texts.append(" ".join(words))
    prompts = lookonce.Embedder(model).prompts(texts)
    return texts, [
        [token for run in prompt.runs if isinstance(run, TokenRun) for token in run.tokens] for prompt in prompts
    ]


def run_peer(job: Job, folder: Path) -> Measured:
    """Measure one peer in a process of its own."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("bench_peer.py")), str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{job.peer} ended with status {found.returncode}:\n{found.stderr[-2000:]}")
    return Measured(**json.loads(found.stdout.splitlines()[-1]))


def compare(case: Case, jobs: Mapping[str, Job], peers: Sequence[str], rounds: int, folder: Path) -> None:
    """Measure a case on every model file, given by name, the peers in turn, and print a line for each.

    transformers has its own weights whatever the file, so it takes its turn once in a round.
    """
    turns = [(name, peer) for name in jobs for peer in peers if peer in case.peers and peer != REFERENCE]
    if REFERENCE in peers and REFERENCE in case.peers:
        turns.append((next(iter(jobs)), REFERENCE))
    measured: dict[tuple[str, str], list[Measured]] = {turn: [] for turn in turns}
    for _ in range(rounds):
        for name, peer in turns:
            measured[name, peer].append(run_peer(replace(jobs[name], peer=peer), folder))
    for name, job in jobs.items():
        for (of, peer), found in measured.items():
            if of == name or peer == REFERENCE:
                count = len(job.texts) or len(job.pictures)
                print(f"{case.name:<24}{name:<8}{peer:<18}{count:>6}", end="")
                print(_figures(count, found, None if peer == "lookonce" else measured[name, "lookonce"]), flush=True)


def _figures(count: int, found: Sequence[Measured], ours: Sequence[Measured] | None) -> str:
    seconds = statistics.median(one.seconds for one in found)
    ratio = python = ""
    if ours is None:
        python = f"{statistics.median(one.python_seconds / one.seconds for one in found):.1%}"
    else:
        ratios = (other.seconds / own.seconds for other, own in zip(found, ours, strict=True))
        ratio = f"{statistics.median(ratios):.2f} x"
    peak = max(one.peak_bytes for one in found) / 1e9
    return f"{seconds:>10.2f} s{count / seconds:>10.2f} /s{ratio:>10}{python:>10}{peak:>9.2f} GB"


def bench(pairs: Mapping[str, tuple[Path, Path]], options: argparse.Namespace, peers: Sequence[str]) -> None:
    """Measure every chosen case on the model files, given by name."""
    for name, files in pairs.items():
        print(f"{name}: " + ", ".join(f"{path.name} {path.stat().st_size / 1e9:.2f} GB" for path in files))
    head = f"{'case':<24}{'file':<8}{'peer':<18}{'items':>6}{'time':>12}{'rate':>13}"
    print(f"\n{head}{'ours is':>10}{'Python':>10}{'peak':>12}", flush=True)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        for case in CASES:
            if options.case and case.name not in options.case:
                continue
            count = options.count or (case.quick_count if options.quick else case.count)
            jobs = {name: _job(case, files, count, options, folder / name) for name, files in pairs.items()}
            compare(case, jobs, peers, 1 if options.quick else options.rounds, folder)


def _job(case: Case, files: tuple[Path, Path], count: int, options: argparse.Namespace, store: Path) -> Job:
    """A case's work with one pair of files."""
    text, projector = files
    job = Job("lookonce", str(text), str(projector), options.shape, options.threads)
    if not case.size[0]:
        with lookonce.load(text, mmproj=projector, device="cpu", store=False) as model:
            texts, prompts = make_texts(model, case, count)
        return replace(job, texts=texts, prompts=prompts)
    job = replace(job, pictures=[case.size] * count, store=str(store) if case.seen else "")
    if case.seen:
        _see_all(job)
    return job


def _see_all(job: Job) -> None:
    """Look at every picture, so that the store holds it."""
    with lookonce.load(job.model, mmproj=job.mmproj, device="cpu", threads=job.threads, store=job.store) as model:
        for picture in make_pictures(job.pictures):
            model.look(picture, min_pixels=4096)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, help="a text model's .gguf (default: models of random weights are made)")
    parser.add_argument("--mmproj", type=Path, help="its projector file")
    parser.add_argument("--folder", type=Path, default=Path("models"), help="where models are made and found again")
    parser.add_argument("--shape", default="2b", help="shape of the models that are made, and of transformers' model")
    parser.add_argument(
        "--type", action="append", choices=["Q4_K_M", "BF16", "F16", "Q8_0"], help="default: Q4_K_M, BF16"
    )
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--peer", action="append", choices=list(PEERS)[1:], help="beside lookonce; default: all")
    parser.add_argument("--count", type=int, help="items of a case, in place of its own number")
    parser.add_argument("--rounds", type=int, default=3, help="how often each peer takes its turn")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--quick", action="store_true", help="few items, one round")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.mmproj):
        parser.error("give --model and --mmproj together")
    return options


def _find_pair(options: argparse.Namespace, type: str) -> tuple[Path, Path]:
    """A made pair, from an earlier run where there is one."""
    stem = f"Qwen3VL-{options.shape}-seed0"
    pair = options.folder / f"{stem}-{type}.gguf", options.folder / f"mmproj-{stem}-F16.gguf"
    if all(path.exists() for path in pair):
        return pair
    print(f"making a {options.shape} model of type {type} in {options.folder}", flush=True)
    text, projector = make_pair(options.folder, shape=options.shape, type=type, mmproj_type="F16")
    return text, projector


def main(arguments: Sequence[str]) -> int:
    """Measure and print the table."""
    options = _parse(arguments)
    peers = ["lookonce", *(options.peer or list(PEERS)[1:])]
    if "transformers" in peers and not importlib.util.find_spec("transformers"):
        print("transformers is not installed: pip install 'lookonce[parity]' to compare with it")
        peers.remove("transformers")
    if options.model:
        pairs = {"given": (options.model, options.mmproj)}
    else:
        pairs = {type: _find_pair(options, type) for type in options.type or ["Q4_K_M", "BF16"]}
    print(f"{options.threads} threads")
    bench(pairs, options, peers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
