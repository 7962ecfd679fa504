"""The benchmark: how long the first token takes by each way that a picture can come, and the rates behind it.

Every measurement is a process of its own (`bench_worker`), the ways take turns, and ratios are those of one round each,
so that a machine that is slow for a while slows all of them. Knows nothing of where its lines go.
"""

import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lookonce import doctor, retype
from lookonce.bench_process import run_process
from lookonce.bench_worker import Job
from lookonce.byte_size import format_size
from lookonce.drawing import draw_scene
from lookonce.errors import InputError, LookonceError, NativeError
from lookonce.model_files import ModelFiles

__all__ = [
    "MEASURES",
    "QUESTION",
    "Report",
    "describe",
    "fact_lines",
    "lines",
    "run_bench",
    "run_worker",
    "save_picture",
]

QUESTION: Final = "What is in this picture, and where?"
MEASURES: Final = ("cold", "rows", "state", "text", "generation", "many")  # `cold` fills the store for those after it
_WAYS: Final = {
    "cold": "cold: tower, prompt, first token",
    "rows": "saved rows replayed, no tower",
    "state": "saved state restored",
    "text": "plain text, prefix in the cache",
}
# Whoever built the kernel, and for what, is nobody's business: system, number and architecture are shown.
_SYSTEM: Final = re.compile(r"^(\S+)( \d+(?:\.\d+)*)?.* (\S+)$")
_SHOWN_SYSTEM: Final = r"\1\2 \3"
_SIDE: Final = 512  # pixels of the drawn picture: 256 rows of a Qwen3-VL


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured: `found` holds, by measurement, what each round's process said; `facts` all about where."""

    facts: Mapping[str, Any]
    found: Mapping[str, Sequence[Mapping[str, Any]]]

    def values(self, measure: str, name: str) -> list[float]:
        """One number of each round; none where a round had none."""
        values = [one.get(name) for one in self.found.get(measure, ())]
        return [] if None in values else [float(str(value)) for value in values]

    def median(self, measure: str, name: str) -> float | None:
        """The median over the rounds, or None where it was not measured."""
        values = self.values(measure, name)
        return statistics.median(values) if values else None

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        """The median of one number over another, each ratio within one round."""
        pairs = list(zip(self.values(*over), self.values(*under), strict=False))
        return statistics.median(first / second for first, second in pairs) if pairs else None

    @property
    def same_answer(self) -> bool:
        """Whether cold, rows and state began to say the same in every round."""
        texts = {one["text"] for way in ("cold", "rows", "state") for one in self.found.get(way, ())}
        return len(texts) <= 1

    def ratios(self) -> dict[str, float | None]:
        """What the first-token times and the generation rate are to each other."""
        first = "first_token_s"
        return {
            "rows_to_cold": self.ratio(("rows", first), ("cold", first)),
            "cold_to_state": self.ratio(("cold", first), ("state", first)),
            "state_to_text": self.ratio(("state", first), ("text", first)),
            "generation_to_bare": self.ratio(("generation", "rate"), ("generation", "bare_rate")),
            "together_to_single": self.ratio(("many", "together_rate"), ("many", "single_rate")),
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        medians = {
            measure: {
                name: self.median(measure, name)
                for name, value in rounds[0].items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            for measure, rounds in self.found.items()
        }
        rates = {
            "prefill_tokens_a_second": self.median("rows", "prefill_rate"),
            "generation_tokens_a_second": self.median("generation", "rate"),
            "bare_generation_tokens_a_second": self.median("generation", "bare_rate"),
            "single_questions_tokens_a_second": self.median("many", "single_rate"),
            "together_questions_tokens_a_second": self.median("many", "together_rate"),
            "looks_a_second": _inverse(self.median("cold", "look_s")),
        }
        return {
            **self.facts,
            "median": medians,
            "rates": rates,
            "ratios": self.ratios(),
            "same_answer": self.same_answer,
            "rounds": {measure: list(rounds) for measure, rounds in self.found.items()},
        }


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def describe(files: ModelFiles, job: Job, rounds: int) -> dict[str, Any]:
    """The machine, the versions, the files and the options, as a report begins."""
    machine, native = doctor.describe_machine(), doctor.describe_native()
    if native.problem:
        raise NativeError(f"the native library cannot be used: {native.problem}")
    projector = files.projector
    if projector is None:
        raise InputError(files.missing)
    return {
        "machine": {
            **dataclasses.asdict(machine),
            "features": list(native.features),
            "threads": job.options.get("threads") or native.threads,
        },
        "versions": doctor.find_versions(),
        "model": {
            "name": files.text.name,
            "text": files.text.path,
            "text_bytes": files.text.size_bytes,
            "projector": projector.path,
            "projector_bytes": projector.size_bytes,
            "projector_type": retype.projector_type(projector),
        },
        "options": {name: value for name, value in job.options.items() if value is not None},
        "picture": job.picture,
        "prompt": job.prompt,
        "max_tokens": job.max_tokens,
        "n_rounds": rounds,
    }


def save_picture(folder: Path) -> Path:
    """Draw the picture that is measured with where none is given."""
    path = folder / "picture.png"
    draw_scene().resize((_SIDE, _SIDE)).save(path)
    return path


def run_bench(
    job: Job,
    *,
    rounds: int,
    turns_from: int = 0,
    measures: Sequence[str] = MEASURES,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure everything `rounds` times; `job.store` is the folder in which the stores are made, and deleted.

    turns_from: the number of the first round, for whoever runs them one by one.

    Raises what the measuring processes raise, and NativeError where one dies.
    """
    found: dict[str, list[dict[str, Any]]] = {measure: [] for measure in measures}
    for turn in range(turns_from, turns_from + rounds):
        with tempfile.TemporaryDirectory(dir=job.store, prefix="round-") as store:
            shift = turn % max(1, len(measures) - 1)
            # Only what fills the store has its place; the others change theirs.
            order = [measures[0], *measures[1 + shift :], *measures[1 : 1 + shift]]
            for measure in order:
                one = dataclasses.replace(job, measure=measure, store=store, turn=turn)
                found[measure].append(run_worker("lookonce.bench_worker", dataclasses.asdict(one)))
                advance(1)
    return found


def run_worker(module: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a module in a process of its own with a job on its stdin, and give the JSON of its last line.

    A projector that the job's options name is taken as it is, whatever LOOKONCE_MMPROJ_TYPE says. Raises InputError or
    LookonceError for what the process says went wrong, NativeError where it dies or says nothing.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("LOOKONCE_STORE_LIMIT", None)  # what is measured has to be kept
    if job.get("options", {}).get("mmproj"):  # the very file that is to be measured
        environment.pop(retype.TYPE_VARIABLE, None)
    command = [sys.executable, "-W", "ignore", "-m", module]
    answer = run_process("the measuring process", command, given=json.dumps(job, default=str), environment=environment)
    if "error" in answer:
        raise (InputError if answer["bad_input"] else LookonceError)(answer["error"])
    return answer


def lines(report: Report) -> Iterator[str]:
    """Give the report for people to read."""
    yield from fact_lines(report.facts)
    yield ""
    yield f"First token, seconds (median of {report.facts['n_rounds']}, least to most)"
    cold = report.median("cold", "first_token_s")
    for way, title in _WAYS.items():
        if values := report.values(way, "first_token_s"):
            middle = statistics.median(values)
            evaluated = report.median(way, "evaluated")
            times = "" if cold is None or way == "cold" else f"{cold / middle:7.1f} x faster"
            yield (
                f"  {title:<34}{middle:8.3f}  ({min(values):.3f} to {max(values):.3f})"
                f"  {evaluated or 0:5.0f} evaluated{times}"
            )
    yield from _part_lines(report)
    yield from _rate_lines(report)
    yield "Peak resident memory"
    for way in _WAYS:
        if peak := report.median(way, "peak_bytes"):
            yield f"  {way:<34}{format_size(int(peak)):>8}"
    if not report.same_answer:
        yield "The answers of cold, rows and state differ: please report this, it is a fault."


def fact_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Where and with what was measured."""
    machine, model, versions = facts["machine"], facts["model"], facts["versions"]
    yield f"{machine['cpu']}, {machine['logical_cores']} logical cores, {machine['threads']} threads used"
    yield f"{format_size(machine['memory_bytes'])} memory, {_SYSTEM.sub(_SHOWN_SYSTEM, machine['system'])}"
    yield f"features used: {' '.join(machine['features'])}"
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"text model  {Path(model['text']).name}, {format_size(model['text_bytes'])}"
    size = format_size(model["projector_bytes"])
    yield f"projector   {Path(model['projector']).name}, {size}, {model['projector_type']}"
    yield f"question    {facts['prompt']!r}"


def _part_lines(report: Report) -> Iterator[str]:
    """Where the time went, and what the files are."""
    cold, state = report.found.get("cold", []), report.found.get("state", [])
    if cold:
        one = cold[0]
        yield f"Prompt: {one['text_tokens']} tokens and {one['image_rows']} image rows"
        yield f"  {'look, of cold':<34}{report.median('cold', 'look_s') or 0:8.3f}"
        yield f"  {'prompt, of cold':<34}{report.median('cold', 'prefill_s') or 0:8.3f}"
    if state:
        read, restore = (report.median("state", name) or 0 for name in ("read_s", "restore_s"))
        size = format_size(int(report.median("state", "state_bytes") or 0))
        yield f"  {'state read from the store, checked':<34}{read:8.3f}  {size}"
        yield f"  {'state restored':<34}{restore:8.3f}"
    load = report.median("rows", "load_s")
    if load is not None:
        yield f"  {'text model loaded, not counted':<34}{load:8.3f}"
    tower = report.median("cold", "tower_s")
    if tower is not None:
        yield f"  {'tower loaded and tried, not counted':<34}{tower:8.3f}"


def _rate_lines(report: Report) -> Iterator[str]:
    told = report.as_dict()
    rates, ratios = told["rates"], told["ratios"]
    yield "Rates, a second"
    for name, title in (
        ("prefill_tokens_a_second", "prompt tokens and rows"),
        ("generation_tokens_a_second", "generated tokens"),
        ("bare_generation_tokens_a_second", "the same, libllama alone"),
        ("single_questions_tokens_a_second", "16 questions, one after the other"),
        ("together_questions_tokens_a_second", "16 questions, together"),
        ("looks_a_second", "looks"),
    ):
        if rates[name] is not None:
            yield f"  {title:<36}{rates[name]:8.2f}"
    yield "Ratios, each within one round (median)"
    for name, title in (
        ("rows_to_cold", "rows / cold"),
        ("cold_to_state", "cold / state"),
        ("state_to_text", "state / text"),
        ("generation_to_bare", "generation / libllama alone"),
        ("together_to_single", "16 questions: together / one by one"),
    ):
        if ratios[name] is not None:
            yield f"  {title:<36}{ratios[name]:8.3f}"
