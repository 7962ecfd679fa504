"""Compare the first token about a picture: Lookonce, llama-cpp-python's chat handler, and transformers.

The same picture, question and model files through each, in a process of its own, in turns; ratios are those of one
round each. Then the projector in another type. Says which of the project's bars are met. transformers takes part where
the `parity` extra is installed, here or in the Python that --transformers-python names.

    python scripts/bench_peers.py --shape 2b --rounds 5
    python scripts/bench_peers.py --model model.gguf --mmproj mmproj.gguf --image photo.jpg --json
    python scripts/bench_peers.py --markdown docs/benchmarks.md
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_ask_peer
from bench_page import read_page, shown_command, write_page
from lookonce import bench, gguf_file, retype
from lookonce.bench_process import run_process
from lookonce.bench_worker import Job
from lookonce.cli_bench import SHAPES
from lookonce.engine import DEFAULT_CONTEXT, LoadOptions, physical_cores
from lookonce.errors import InputError, LookonceError
from lookonce.look_plan import check_picture
from lookonce.model_files import find_files
from lookonce.projector_choice import compare
from lookonce.synthetic.pair import find_pair, make_pair
from script_options import Parser

__all__ = ["BARS", "Bar", "Results", "markdown"]

_SCRIPT = "bench_peers.py"
_SCRIPTS = Path(__file__).resolve().parent
_TITLES = {
    "llama": ("llama-cpp-python, MTMD chat handler", "first_token_s"),
    "llama again": ("the same, asked again", "again_s"),
    "transformers": ("transformers, BF16", "first_token_s"),
    "cold": ("Lookonce, cold", "first_token_s"),
    "rows": ("Lookonce, saved rows", "first_token_s"),
    "state": ("Lookonce, saved state", "first_token_s"),
    "text": ("plain text, prefix in the cache", "first_token_s"),
}


@dataclass(frozen=True, slots=True)
class Results:
    """Lookonce's own report, what each peer's process said in each round, and the projector in another type."""

    own: bench.Report
    peers: Mapping[str, Sequence[Mapping[str, Any]]]
    retyped: Mapping[str, Any]

    def times(self, way: str) -> list[float]:
        """Seconds to the first token, one for each round."""
        name = _TITLES[way][1]
        if way in ("llama", "llama again"):
            return [one[name] for one in self.peers.get("llama-cpp-python", ())]
        if way == "transformers":
            return [one[name] for one in self.peers.get("transformers", ())]
        return self.own.values(way, name)

    def ratio(self, over: str, under: str) -> float | None:
        """The median of one way's time over another's, each ratio within one round."""
        pairs = list(zip(self.times(over), self.times(under), strict=False))
        return statistics.median(first / second for first, second in pairs) if pairs else None

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        bars = [{**asdict(bar), "value": bar.value(self), "passed": bar.passed(self)} for bar in BARS]
        return {**self.own.as_dict(), "peers": self.peers, "retyped": self.retyped, "bars": bars}


@dataclass(frozen=True, slots=True)
class Bar:
    """One thing that is promised: a value that `name` finds, and its bound."""

    what: str
    name: str
    bound: float
    at_least: bool

    def value(self, results: Results) -> float | None:
        """What was measured, or None where it was not."""
        own = results.own
        if self.name == "read and restore":
            pairs = zip(own.values("state", "read_s"), own.values("state", "restore_s"), strict=True)
            sums = [read + restore for read, restore in pairs]
            return statistics.median(sums) if sums else None
        if self.name == "lowest row cosine":
            return results.retyped.get("lowest_row_cosine")
        if self.name == "look gain":  # promised for CPUs that multiply BF16
            has_bf16 = "AVX512_BF16" in own.facts["machine"]["features"]
            return results.retyped.get("look_gain") if has_bf16 else None
        if self.name == "generation":
            return own.ratio(("generation", "rate"), ("generation", "bare_rate"))
        if self.name == "many":
            return own.ratio(("many", "together_rate"), ("many", "single_rate"))
        over, _, under = self.name.partition(" / ")
        return results.ratio(over, under)

    def passed(self, results: Results) -> bool | None:
        """Whether the bound is kept, or None where it was not measured."""
        value = self.value(results)
        if value is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound


BARS = (
    Bar("first token with a kept state / plain text", "state / text", 1.10, at_least=False),
    Bar("llama-cpp-python's first token / with a kept state", "llama / state", 15, at_least=True),
    Bar("state read from the store and restored, seconds", "read and restore", 0.030, at_least=False),
    Bar("first token from saved rows / cold", "rows / cold", 0.45, at_least=False),
    Bar("look with the F16 projector / with BF16", "look gain", 1.5, at_least=True),
    Bar("lowest cosine of a row, F16 and BF16", "lowest row cosine", 0.999, at_least=True),
    Bar("generation / libllama alone", "generation", 0.97, at_least=True),
    Bar("16 questions together / one after the other", "many", 1.7, at_least=True),
)


def measure(options: argparse.Namespace, text: Path, projector: Path, folder: Path) -> Results:
    """Measure everything, Lookonce's ways and the peers in turns."""
    files = find_files(text, projector, retyped=False)
    picture = options.image.absolute() if options.image else bench.save_picture(folder)
    loading = {**_as_it_is(projector), "device": "cpu", "threads": options.threads, "n_ctx": options.n_ctx}
    job = Job("", str(text), str(picture), options.prompt, str(folder), loading, options.max_tokens)
    found: dict[str, list[dict[str, Any]]] = {}
    peers: dict[str, list[dict[str, Any]]] = {peer: [] for peer in options.peer}
    for turn in range(options.rounds):
        own = bench.run_bench(job, rounds=1, turns_from=turn)
        for name, rounds in own.items():
            found.setdefault(name, []).extend(rounds)
        _say(f"round {turn + 1} of {options.rounds}: Lookonce")
        for peer in options.peer if turn % 2 else reversed(options.peer):
            text_tokens = own["cold"][0]["text_tokens"]
            asked = bench_ask_peer.Job(
                *(peer, str(text), str(projector), options.shape, str(picture), options.prompt),
                *(options.threads, options.n_ctx, options.max_tokens, text_tokens),
            )
            peers[peer].append(_run_peer(asked, options.transformers_python))
            _say(f"round {turn + 1} of {options.rounds}: {peer}")
    report = bench.Report(bench.describe(files, job, options.rounds), found)
    return Results(report, peers, {} if options.no_retype else _measure_retyped(job, options.rounds, folder))


def _as_it_is(projector: Path) -> dict[str, Any]:
    """The options of `lookonce.load` that take this very file, also where the model's card asks for another type."""
    kind = retype.projector_type(gguf_file.read(projector))
    return {"mmproj": str(projector), "mmproj_type": kind if kind in retype.TYPES else None}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run_peer(job: bench_ask_peer.Job, transformers_python: Path) -> dict[str, Any]:
    python = str(transformers_python) if job.peer == "transformers" else sys.executable
    command = [python, "-W", "ignore", str(_SCRIPTS / "bench_ask_peer.py")]
    return run_process(job.peer, command, given=json.dumps(asdict(job)), environment=_environment(python))


def _environment(python: str) -> dict[str, str]:
    # Another Python has its own libraries: only this project's are handed on.
    paths = sys.path if python == sys.executable else [str(_SCRIPTS.parent / "src"), str(_SCRIPTS)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _measure_retyped(job: Job, rounds: int, folder: Path) -> dict[str, Any]:
    """What `auto` chooses, and looks with an F16 projector and with the same in BF16, in turns."""
    original = folder / Path(job.options["mmproj"]).name
    original.symlink_to(Path(job.options["mmproj"]).absolute())  # the retyped file goes beside it
    found: dict[str, Any] = {"auto": _choose(original, job.options["threads"])}
    if retype.projector_type(retype.read_original(original)) != "F16":
        return found
    made = retype.retype(original, "BF16").path
    times: dict[Path, list[float]] = {original: [], made: []}
    for turn in range(rounds):
        for path in (original, made) if turn % 2 else (made, original):
            one = dataclasses.replace(job, measure="look", options={**job.options, **_as_it_is(path)}, turn=turn)
            times[path].append(bench.run_worker("lookonce.bench_worker", asdict(one))["look_s"])
        _say(f"round {turn + 1} of {rounds}: the projector in F16 and BF16")
    pairs = zip(times[original], times[made], strict=True)
    return {
        **found,
        "f16_look_s": times[original],
        "bf16_look_s": times[made],
        "look_gain": statistics.median(first / second for first, second in pairs),
        "lowest_row_cosine": compare(original, made, threads=job.options["threads"]),
    }


def _choose(original: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "lookonce", "models", "retype", str(original), "--threads", str(threads), "--json"]
    told = run_process("models retype", command, environment=_environment(sys.executable))
    return {name: told[name] for name in ("type", "reason", "times_s")}


def table(results: Results) -> Iterator[tuple[str, str, str, str, str]]:
    """The first-token table's rows: way, median, range, against a kept state, peak memory."""
    for way, (title, _) in _TITLES.items():
        if not (times := results.times(way)):
            continue
        against = results.ratio(way, "state")
        peak = _peak(results, way)
        yield (
            title,
            f"{statistics.median(times):.3f}",
            f"{min(times):.3f} to {max(times):.3f}",
            "" if against is None else f"{against:.2f}",
            "" if peak is None else f"{peak / 1e9:.2f}",
        )


def _peak(results: Results, way: str) -> float | None:
    if way in results.own.found:
        return results.own.median(way, "peak_bytes")
    peer = {"llama": "llama-cpp-python", "transformers": "transformers"}.get(way, "")
    found = [float(one["peak_bytes"]) for one in results.peers.get(peer, ())]
    return statistics.median(found) if found else None


_HEAD = ("first token", "median s", "range s", "x kept state", "peak GB")


def notes(results: Results) -> Iterator[str]:
    """What each did, and the numbers beside the first token."""
    one = results.own.found["cold"][0]
    options = results.own.facts["options"]
    yield (
        f"Lookonce: {one['text_tokens']} tokens and {one['image_rows']} image rows, n_batch 512, "
        f"{results.own.facts['machine']['threads']} threads, n_ctx {options['n_ctx']}, K and V in F16"
    )
    for peer, rounds in results.peers.items():
        if rounds:
            one = rounds[0]
            rate = "" if one["rate"] is None else f", {statistics.median(one['rate'] for one in rounds):.2f} tokens/s"
            yield f"{peer}: {one['text_tokens']} tokens and {one['image_rows']} image tokens; {one['did']}{rate}"
    rates = results.own.as_dict()["rates"]
    yield (
        f"Lookonce's rates: prompt {rates['prefill_tokens_a_second']:.1f} tokens/s, "
        f"generation {rates['generation_tokens_a_second'] or 0:.2f} tokens/s "
        f"(libllama alone {rates['bare_generation_tokens_a_second'] or 0:.2f}), looks {rates['looks_a_second']:.3f}/s"
    )
    if (rates["together_questions_tokens_a_second"] or 0) > 0:
        single, together = (rates[f"{way}_questions_tokens_a_second"] for way in ("single", "together"))
        yield f"16 questions: one after the other {single:.2f} tokens/s in all, together {together:.2f}"
    if auto := results.retyped.get("auto"):
        yield f"models retype --type auto: {auto['reason']}"
    if results.retyped.get("look_gain"):
        looks = (statistics.median(results.retyped[name]) for name in ("f16_look_s", "bf16_look_s"))
        yield "look with the projector in F16 {:.3f} s, in BF16 {:.3f} s".format(*looks)


def bar_rows(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """The bars: what, measured, bound, verdict."""
    for bar in BARS:
        value, passed = bar.value(results), bar.passed(results)
        verdict = "not measured" if passed is None else "pass" if passed else "MISS"
        bound = f"{'at least' if bar.at_least else 'at most'} {bar.bound:g}"
        yield bar.what, "" if value is None else f"{value:.4g}", bound, verdict


def lines(results: Results) -> Iterator[str]:
    """The results for people to read."""
    yield from bench.fact_lines(results.own.facts)
    yield ""
    for row in (_HEAD, *table(results)):
        yield f"{row[0]:<38}{row[1]:>10}{row[2]:>20}{row[3]:>14}{row[4]:>10}"
    yield ""
    yield from notes(results)
    yield ""
    for what, value, bound, verdict in bar_rows(results):
        yield f"{what:<52}{value:>10}   {bound:<16}{verdict}"


def markdown(results: Results, command: str) -> str:
    """The results as a page of Markdown shows them."""
    parts = ["```sh", command, "```", ""]
    parts += [f"- {line}" for line in bench.fact_lines(results.own.facts)]
    parts += ["", _row(_HEAD), _row(["---", *["---:"] * (len(_HEAD) - 1)]), *map(_row, table(results)), ""]
    parts += [f"- {line}" for line in notes(results)]
    parts += ["", _row(("bar", "measured", "bound", "")), _row(["---", "---:", "---", "---"])]
    parts += map(_row, bar_rows(results))
    return "\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return value

    return read


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="bench_peers", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, help="a text model's .gguf (default: one of random weights is made)")
    parser.add_argument("--mmproj", type=Path, help="its projector file")
    parser.add_argument("--folder", type=Path, default=Path("models"), help="where models are made and found again")
    parser.add_argument("--shape", default="2b", help="shape of the model that is made, and of transformers' model")
    parser.add_argument("--image", type=Path, help="the picture (default: drawn shapes, 512 x 512)")
    parser.add_argument("--prompt", default=bench.QUESTION)
    parser.add_argument("--peer", action="append", choices=list(bench_ask_peer.PEERS), help="default: all")
    parser.add_argument("--rounds", type=_at_least(1), default=5)
    parser.add_argument("--max-tokens", type=_at_least(2), default=64, help="of the long answers")
    parser.add_argument("--n-ctx", type=_at_least(1), default=DEFAULT_CONTEXT)
    parser.add_argument("--threads", type=_at_least(1), default=physical_cores())
    parser.add_argument(
        "--transformers-python", type=Path, default=Path(sys.executable), help="a Python that has transformers"
    )
    parser.add_argument("--no-retype", action="store_true", help="leave the projector's types out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", type=Path, help="a page that gets the results between its marks")
    options = parser.parse_args(arguments)
    _check(options)
    options.peer = options.peer or list(bench_ask_peer.PEERS)
    own_python = options.transformers_python == Path(sys.executable)
    if "transformers" in options.peer and own_python and not importlib.util.find_spec("transformers"):
        _say("transformers is not installed: pip install 'lookonce[parity]', or give --transformers-python")
        options.peer.remove("transformers")
    if "transformers" in options.peer:
        _check_transformers(str(options.transformers_python))
    return options


def _check_transformers(python: str) -> None:
    """Refuse a Python in which the peer would fail, as it would do after all of the first round."""
    command = [python, "-W", "ignore", "-c", "import bench_ask_peer, transformers, torch; print('{}')"]
    try:
        run_process("it", command, environment=_environment(python))
    except LookonceError as error:
        raise InputError(
            f"--transformers-python {python!r} cannot run transformers ({error}): give a Python that has "
            "lookonce[parity], or leave this peer out with --peer llama-cpp-python"
        ) from error


def _check(options: argparse.Namespace) -> None:
    """Refuse now what would be refused after minutes of work."""
    if bool(options.model) != bool(options.mmproj):
        raise InputError("--model and --mmproj belong together: give both, or neither")
    if options.shape not in SHAPES:
        raise InputError(f"there is no shape {options.shape!r}: choose one of {', '.join(SHAPES)}")
    LoadOptions(n_ctx=options.n_ctx, threads=options.threads)
    if shutil.which(options.transformers_python) is None:
        raise InputError(f"--transformers-python {str(options.transformers_python)!r} is no program: give a Python's")
    if options.image:
        check_picture(str(options.image))
    if options.markdown:
        read_page(options.markdown, _SCRIPT)


def _pair(options: argparse.Namespace) -> tuple[Path, Path]:
    if options.model:
        return options.model, options.mmproj
    made = find_pair(options.folder, shape=options.shape, type="Q4_K_M", mmproj_type="F16")
    if made is None:
        _say(f"making a {options.shape} model of random weights in {options.folder}")
        made = make_pair(options.folder, shape=options.shape, type="Q4_K_M", mmproj_type="F16")
    return made


def main(arguments: Sequence[str]) -> int:
    """Measure and print; status 1 where a bar is missed."""
    try:
        options = _parse(arguments)
        text, projector = _pair(options)
        with tempfile.TemporaryDirectory(dir=projector.parent, prefix=".bench-") as folder:
            results = measure(options, text.absolute(), projector.absolute(), Path(folder).absolute())
        print(json.dumps(results.as_dict(), default=str) if options.json else "\n".join(lines(results)))
        if options.markdown:
            write_page(options.markdown, _SCRIPT, markdown(results, shown_command(_SCRIPT, options, arguments)))
    except (LookonceError, ValueError, OSError) as error:
        _say(f"bench_peers: {error}")
        return 2
    return 1 if any(bar.passed(results) is False for bar in BARS) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
