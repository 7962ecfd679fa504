"""Time vectors: Lookonce against llama-cpp-python's `Llama.embed` and against transformers in BF16.

Every measurement is a process of its own, the peers take turns, and the ratios are those of one round each, so that
a machine that is slow for a while slows all of them. transformers takes part where the `parity` extra is installed.

    python scripts/bench_embed.py --quick
    python scripts/bench_embed.py --model model.gguf --mmproj mmproj.gguf --case short --peer llama-cpp-python
    python scripts/bench_embed.py --markdown docs/benchmarks.md
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

import lookonce
from bench_page import read_page, shown_command, write_page
from bench_peer import PEERS, REFERENCE, Job, Measured, make_pictures
from lookonce import doctor
from lookonce.bench_process import run_process
from lookonce.engine import physical_cores
from lookonce.errors import InputError, LookonceError
from lookonce.prompt import TokenRun
from lookonce.retype import TYPE_VARIABLE
from lookonce.synthetic.pair import find_pair, make_pair

__all__ = ["CASES", "Case", "Line", "describe_texts", "make_texts", "markdown", "summarize"]

_SCRIPT = "bench_embed.py"
_HEAD = ("case", "file", "peer", "items", "time", "rate", "ours is", "Python", "peak")
_WIDTHS = (24, 8, 18, 6, 12, 13, 10, 10, 12)
_WORDS = ("a", "the", "red", "green", "cat", "dog", "circle", "square", "picture", "of", "two", "left", "above", "What")
_MOST_REPEATS = 1000  # drawn in a row, after which no other text is expected


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


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: what one peer took for a case with one file.

    `seconds` and `python_share` (Lookonce's alone) are medians, as is `ratio`, how many times as fast Lookonce was in
    the same round; `peak_bytes` is the most that any of the peer's processes held.
    """

    case: str
    file: str
    peer: str
    count: int
    seconds: float
    ratio: float | None
    python_share: float | None
    peak_bytes: int

    @property
    def cells(self) -> tuple[str, ...]:
        """The figures as they are written."""
        return (
            *(self.case, self.file, self.peer, str(self.count)),
            f"{self.seconds:.2f} s",
            f"{self.count / self.seconds:.2f} /s",
            "" if self.ratio is None else f"{self.ratio:.2f} x",
            "" if self.python_share is None else f"{self.python_share:.1%}",
            f"{self.peak_bytes / 1e9:.2f} GB",
        )


def make_texts(model: lookonce.Model, case: Case, count: int) -> tuple[list[str], list[list[int]]]:
    """Different texts of about the case's length in tokens, and the ids of their prompts.

    Of equal texts Lookonce evaluates one: they would measure that, and not how fast it is. Raises InputError where
    there are not so many.
    """
    draw = random.Random(0)
    texts: dict[str, None] = {}
    tokenize = model.engine.text.tokenize
    repeats = 0
    while len(texts) < count:
        wanted = draw.randint(case.tokens // 2, case.tokens * 3 // 2) if case.tokens < 100 else case.tokens
        words = [draw.choice(_WORDS)]
        while len(tokenize(" ".join(words))) < wanted:
            words.append(draw.choice(_WORDS))
        text = " ".join(words)
        repeats = repeats + 1 if text in texts else 0
        if repeats == _MOST_REPEATS:
            raise InputError(
                f"--count {count} is more than the texts of the case {case.name!r} that differ, of which {len(texts)} "
                "were found: give a smaller one"
            )
        texts[text] = None
    prompts = lookonce.Embedder(model).prompts(list(texts))
    return list(texts), [
        [token for run in prompt.runs if isinstance(run, TokenRun) for token in run.tokens] for prompt in prompts
    ]


def describe_texts(model: lookonce.Model, job: Job) -> str:
    """What the texts of a job are, and how many tokens of them are there to evaluate."""
    tokens = statistics.mean(len(model.engine.text.tokenize(text)) for text in job.texts)
    words = statistics.mean(len(text.split()) for text in job.texts)
    whole = statistics.mean(map(len, job.prompts))
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*job.prompts, strict=False)))
    return (
        f"{len(job.texts)} texts, {len(set(job.texts))} of them different, "
        f"of {words:.1f} words in {tokens:.1f} tokens; "
        f"a prompt has {whole:.1f} tokens, and {shared} of them begin every prompt"
    )


def run_peer(job: Job, folder: Path) -> Measured:
    """Measure one peer in a process of its own. Raises LookonceError where that fails."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("bench_peer.py")), str(path)]
    return Measured(**run_process(job.peer, command))


def compare(case: Case, jobs: Mapping[str, Job], peers: Sequence[str], rounds: int, folder: Path) -> list[Line]:
    """Measure a case on every model file, given by name, the peers in turn.

    transformers has its own weights whatever the file, so it takes its turn once in a round.
    """
    turns = [(name, peer) for name in jobs for peer in peers if peer in case.peers and peer != REFERENCE]
    if REFERENCE in peers and REFERENCE in case.peers:
        turns.append((next(iter(jobs)), REFERENCE))
    measured: dict[tuple[str, str], list[Measured]] = {turn: [] for turn in turns}
    for _ in range(rounds):
        for name, peer in turns:
            measured[name, peer].append(run_peer(replace(jobs[name], peer=peer), folder))
    return list(
        summarize(case.name, {name: len(job.texts) or len(job.pictures) for name, job in jobs.items()}, measured)
    )


def summarize(
    case: str, counts: Mapping[str, int], measured: Mapping[tuple[str, str], Sequence[Measured]]
) -> Iterator[Line]:
    """A case's lines, file by file; `counts` has its items by file, `measured` the rounds by file and peer."""
    for name, count in counts.items():
        ours = measured[name, "lookonce"]
        for (of, peer), found in measured.items():
            if of != name and peer != REFERENCE:
                continue
            ratio = share = None
            if peer == "lookonce":
                share = statistics.median(one.python_seconds / one.seconds for one in found)
            else:
                ratio = statistics.median(one.seconds / own.seconds for one, own in zip(found, ours, strict=True))
            seconds = statistics.median(one.seconds for one in found)
            peak = max(one.peak_bytes for one in found)
            yield Line(case, name, peer, count, seconds, ratio, share, peak)


def bench(pairs: Mapping[str, tuple[Path, Path]], options: argparse.Namespace, peers: Sequence[str]) -> str:
    """Measure every chosen case on the model files, given by name, and print; give the same as a page shows it."""
    facts = list(_facts(pairs, options))
    print("\n".join(facts), end="\n\n")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        for case in CASES:
            if options.case and case.name not in options.case:
                continue
            count = options.count or (case.quick_count if options.quick else case.count)
            jobs = {}
            for name, files in pairs.items():
                jobs[name], told = _job(case, files, count, options, folder / name)
            if told:
                facts.append(f"{case.name}: {told}")
                print(facts[-1], flush=True)
            if not lines:
                _print_row(_HEAD)
            found = compare(case, jobs, peers, 1 if options.quick else options.rounds, folder)
            for line in found:
                _print_row(line.cells)
            lines += found
    return markdown(lines, facts, shown_command(_SCRIPT, options, options.given))


def _print_row(cells: Sequence[str]) -> None:
    texts, figures = cells[:3], cells[3:]
    row = "".join(f"{cell:<{width}}" for cell, width in zip(texts, _WIDTHS, strict=False))
    print(row + "".join(f"{cell:>{width}}" for cell, width in zip(figures, _WIDTHS[3:], strict=True)), flush=True)


def markdown(lines: Sequence[Line], facts: Sequence[str], command: str) -> str:
    """The results as a page of Markdown shows them."""
    rows = [_HEAD, ("---", "---", "---", *["---:"] * (len(_HEAD) - 3)), *(line.cells for line in lines)]
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["```sh", command, "```", "", *(f"- {fact}" for fact in facts), "", *table]) + "\n"


def _facts(pairs: Mapping[str, tuple[Path, Path]], options: argparse.Namespace) -> Iterator[str]:
    """Where and with what is measured."""
    machine = doctor.describe_machine()
    rounds = 1 if options.quick else options.rounds
    yield f"{machine.cpu}, {options.threads} threads, {rounds} {'round' if rounds == 1 else 'rounds'}"
    yield ", ".join(f"{name} {version}" for name, version in doctor.find_versions().items())
    for name, files in pairs.items():
        yield f"{name}: " + ", ".join(f"{path.name} {path.stat().st_size / 1e9:.2f} GB" for path in files)


def _job(case: Case, files: tuple[Path, Path], count: int, options: argparse.Namespace, store: Path) -> tuple[Job, str]:
    """A case's work with one pair of files, and what its texts are."""
    text, projector = files
    job = Job("lookonce", str(text), str(projector), options.shape, options.threads)
    if not case.size[0]:
        with lookonce.load(text, mmproj=projector, device="cpu", store=False) as model:
            texts, prompts = make_texts(model, case, count)
            job = replace(job, texts=texts, prompts=prompts)
            return job, describe_texts(model, job)
    job = replace(job, pictures=[case.size] * count, store=str(store) if case.seen else "")
    if case.seen:
        _see_all(job)
    return job, ""


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
    parser.add_argument("--markdown", type=Path, help="a page that gets the results between its marks")
    options = parser.parse_args(arguments)
    options.given = arguments
    if bool(options.model) != bool(options.mmproj):
        parser.error("give --model and --mmproj together")
    if options.markdown:  # before an hour's work
        read_page(options.markdown, _SCRIPT)
    return options


def _find_pair(options: argparse.Namespace, type: str) -> tuple[Path, Path]:
    """A made pair, from an earlier run where there is one."""
    found = find_pair(options.folder, shape=options.shape, type=type, mmproj_type="F16")
    if found is not None:
        return found
    print(f"making a {options.shape} model of type {type} in {options.folder}", flush=True)
    return make_pair(options.folder, shape=options.shape, type=type, mmproj_type="F16")


def main(arguments: Sequence[str]) -> int:
    """Measure and print the table."""
    os.environ.pop(TYPE_VARIABLE, None)  # the very files that are named are measured, here and in the processes
    try:
        options = _parse(arguments)
        peers = ["lookonce", *(options.peer or list(PEERS)[1:])]
        if "transformers" in peers and not importlib.util.find_spec("transformers"):
            print("transformers is not installed: pip install 'lookonce[parity]' to compare with it")
            peers.remove("transformers")
        if options.model:
            pairs = {"given": (options.model, options.mmproj)}
        else:
            pairs = {type: _find_pair(options, type) for type in options.type or ["Q4_K_M", "BF16"]}
        page = bench(pairs, options, peers)
        if options.markdown:
            write_page(options.markdown, _SCRIPT, page)
    except (LookonceError, ValueError, OSError) as error:
        print(f"bench_embed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
