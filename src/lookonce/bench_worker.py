"""One measurement of the benchmark, in a process of its own: `python -m lookonce.bench_worker`, a job on stdin.

Each process loads the model, answers something else first, so that weights are in memory and the library has made what
it makes once, and then measures one thing, with the store's files in the page cache. What it found goes to stdout as
one line of JSON.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lookonce.errors import InputError, LookonceError
from lookonce.kept_state import KeptState
from lookonce.model import Model, load
from lookonce.native.cache import write_state
from lookonce.native.text import Context, ContextOptions
from lookonce.peak_memory import peak_bytes
from lookonce.prefix_store import StateMode
from lookonce.prompt import Message, Prompt, TokenRun
from lookonce.reply import Reply
from lookonce.sampling import Sampling

__all__ = ["MEASURES", "Job", "work"]

_WARM_UP: Final = "Hello."
_N_QUESTIONS: Final = 16
_LONGEST_ANSWER: Final = 32  # of many questions: all of them take long enough
_FILLER: Final = "The picture of the circle and the square is in the system. "


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure (one of `MEASURES`), and on what.

    `options` are those of `lookonce.load`; `store` is the benchmark's own folder, which `cold` fills and the others
    read. `turn` is the round's number: what is measured in turns in one process changes its order by it.
    """

    measure: str
    model: str
    picture: str
    prompt: str
    store: str
    options: Mapping[str, Any]
    max_tokens: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    turn: int = 0


def work(job: Job) -> dict[str, Any]:
    """Measure in this process. Raises what `lookonce.load` and `Model.ask` raise."""
    found = MEASURES[job.measure](job)
    return {**found, "peak_bytes": peak_bytes()}


def _load(job: Job, state: StateMode, *, stored: bool = True) -> tuple[Model, float]:
    if stored:
        _fill_page_cache(Path(job.store))
    started = time.perf_counter()
    model = load(job.model, **job.options, store=job.store if stored else False, state=state, trial=False)
    return model, time.perf_counter() - started


def _fill_page_cache(folder: Path) -> None:
    """Have the system hold a store's files in memory, as it does after they are written unless something takes it."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def _cold(job: Job) -> dict[str, Any]:
    """A picture that was never seen: the tower, the whole prompt, the first token; what is learnt is kept."""
    model, load_s = _load(job, "on")
    with model:
        started = time.perf_counter()
        model.look(np.zeros((64, 64, 3), dtype=np.uint8))
        tower_s = time.perf_counter() - started
        return {**_ask(model, job), "load_s": load_s, "tower_s": tower_s}


def _rows(job: Job) -> dict[str, Any]:
    """The look is in the store, its state is not used: no tower, the whole prompt."""
    model, load_s = _load(job, "off")
    with model:
        found = _ask(model, job)
        if model.tower_loaded:
            raise LookonceError("the look was not found in the store, though it had been kept: please report this")
        return {**found, "load_s": load_s}


def _state(job: Job) -> dict[str, Any]:
    """The state up to the picture's end is in the store: only the question is evaluated."""
    model, load_s = _load(job, "read")
    with model:
        found = _ask(model, job)
        return {**found, "load_s": load_s, **_restore_times(model, job)}


def _text(job: Job) -> dict[str, Any]:
    """The same question after as many tokens of text as the picture's part of the prompt, which are in the cache."""
    model, load_s = _load(job, "off")
    with model:
        prompt = _picture_prompt(model, job)
        prefix, question = _parted(prompt)
        with Context(model.engine.text, _own_options(model, prefix + len(question))) as context:
            first_s = _text_first_token(model, job, context, prefix, len(question))
        return {"load_s": load_s, "first_token_s": first_s, "prefix_cells": prefix, "evaluated": len(question)}


def _generation(job: Job) -> dict[str, Any]:
    """An answer to a question without a picture, and the same tokens through a bare loop of decode calls, in turns."""
    model, load_s = _load(job, "off")
    with model:
        reply = _generate(model, job)
        count = _steps(reply)
        tokens = _tokens(model.engine.prompt([Message("user", (job.prompt,))]))
        answer = model.engine.text.tokenize(reply.text or _FILLER, special=False)
        answer = (answer * (count // len(answer) + 1))[:count]
        with Context(model.engine.text, _own_options(model, len(tokens) + count + 1)) as context:

            def bare() -> float | None:
                _decode(context, tokens, 0)
                started = time.perf_counter()
                for offset, token in enumerate(answer):
                    context.decode_tokens([token], position=len(tokens) + offset)
                return count / (time.perf_counter() - started) if count else None

            def ours() -> float | None:
                return _rate(_generate(model, job))

            if job.turn % 2:
                bare_rate, rate = bare(), ours()
            else:
                rate, bare_rate = ours(), bare()
        return {"load_s": load_s, "generated": count, "rate": rate, "bare_rate": bare_rate}


def _many(job: Job) -> dict[str, Any]:
    """Sixteen questions about the picture, whose state is in memory: one after the other, and all at once, in turns."""
    model, load_s = _load(job, "read")
    with model:
        _ask(model, job)
        questions = [f"{number}. {job.prompt}" for number in range(1, _N_QUESTIONS + 1)]
        options: dict[str, Any] = {
            "images": [job.picture],
            "min_pixels": job.min_pixels,
            "max_pixels": job.max_pixels,
            "temperature": 0.0,
            "max_tokens": min(job.max_tokens, _LONGEST_ANSWER),
        }
        ways: dict[str, Callable[[], list[Reply]]] = {
            "single": lambda: [model.ask(question, **options) for question in questions],
            "together": lambda: model.ask_many(questions, **options),
        }
        found: dict[str, Any] = {"load_s": load_s, "questions": len(questions)}
        texts = []
        for way in sorted(ways, reverse=bool(job.turn % 2)):
            started = time.perf_counter()
            replies = ways[way]()
            seconds = time.perf_counter() - started
            found |= {f"{way}_s": seconds, f"{way}_rate": sum(one.usage.generated for one in replies) / seconds}
            texts.append([one.text for one in replies])
        return {**found, "same_texts": sum(one == other for one, other in zip(*texts, strict=True))}


def _ask(model: Model, job: Job) -> dict[str, Any]:
    _warm_up(model)
    reply = model.ask(
        job.prompt,
        images=[job.picture],
        min_pixels=job.min_pixels,
        max_pixels=job.max_pixels,
        temperature=0.0,
        max_tokens=2,
    )
    evaluated = reply.usage.text_tokens + reply.usage.image_rows - reply.usage.reused
    return {
        "text": reply.text,
        **dataclasses.asdict(reply.usage),
        **dataclasses.asdict(reply.timings),
        "evaluated": evaluated,
        "prefill_rate": evaluated / reply.timings.prefill_s,
    }


def _warm_up(model: Model) -> None:
    model.ask(_WARM_UP, temperature=0.0, max_tokens=2)


def _generate(model: Model, job: Job) -> Reply:
    return model.ask(job.prompt, temperature=0.0, max_tokens=job.max_tokens)


def _steps(reply: Reply) -> int:
    """How many tokens were drawn after the first: those that `generation_s` covers."""
    return reply.usage.generated - (reply.finish_reason == "length")


def _rate(reply: Reply) -> float | None:
    return _steps(reply) / reply.timings.generation_s if _steps(reply) else None


def _picture_prompt(model: Model, job: Job) -> Prompt:
    look = model.look(job.picture, min_pixels=job.min_pixels, max_pixels=job.max_pixels)
    return model.engine.prompt([Message("user", (look, job.prompt))])


def _parted(prompt: Prompt) -> tuple[int, tuple[int, ...]]:
    """The cells up to the picture's end, and the tokens after it."""
    last = prompt.runs[-1]
    if not isinstance(last, TokenRun):
        raise InputError("the model's chat template puts nothing after a picture: another one is needed to measure")
    return prompt.n_tokens + prompt.n_rows - len(last.tokens), last.tokens


def _tokens(prompt: Prompt) -> list[int]:
    return [token for run in prompt.runs if isinstance(run, TokenRun) for token in run.tokens]


def _own_options(model: Model, need: int) -> ContextOptions:
    """A context as the model's own, but with one sequence and no more cells than are needed."""
    n_ctx = min(-(-need // 256) * 256, model.n_ctx)
    return dataclasses.replace(model.engine.options, n_ctx=n_ctx, n_sequences=1)


def _decode(context: Context, tokens: Sequence[int], position: int) -> None:
    for start in range(0, len(tokens), context.batch_size):
        context.decode_tokens(tokens[start : start + context.batch_size], position=position + start)


def _text_first_token(model: Model, job: Job, context: Context, prefix: int, n_question: int) -> float:
    """From the question to the first token, where `prefix` tokens of text are in the cache."""
    engine = model.engine
    filler = engine.text.tokenize(_FILLER)
    _decode(context, (filler * (prefix // len(filler) + 1))[:prefix], 0)
    started = time.perf_counter()
    prompt = engine.prompt([Message("user", (job.prompt,))])
    sampler = engine.sampler(Sampling(temperature=0.0), prompt)
    # The end of the prompt without a picture is that of the prompt with one, but for the token that closes the picture.
    tokens = _tokens(prompt)
    question = (tokens * (n_question // len(tokens) + 1))[-n_question:]
    _decode(context, question, prefix)
    sampler.sample(context)
    seconds = time.perf_counter() - started
    sampler.close()
    return seconds


def _restore_times(model: Model, job: Job) -> dict[str, Any]:
    """What reading the state from the store takes, checksum and all, and writing it into a context."""
    prompt = _picture_prompt(model, job)
    states = model.engine.states
    started = time.perf_counter()
    kept: KeptState | None = None if states is None else states.fetch(prompt, beyond=0)
    read_s = time.perf_counter() - started
    if kept is None:
        raise LookonceError("the state was not found in the store, though it had been kept: please report this")
    with Context(model.engine.text, _own_options(model, kept.held.n_cells + 1)) as context:
        started = time.perf_counter()
        write_state(context, 0, kept.state, last=kept.last)
        restore_s = time.perf_counter() - started
    return {"read_s": read_s, "restore_s": restore_s, "state_bytes": kept.state.nbytes}


def _look(job: Job) -> dict[str, Any]:
    """The tower alone, without the store, which has the look from an earlier round."""
    model, load_s = _load(job, "off", stored=False)
    with model:
        model.look(np.zeros((64, 64, 3), dtype=np.uint8))
        started = time.perf_counter()
        look = model.look(job.picture, min_pixels=job.min_pixels, max_pixels=job.max_pixels)
        return {"load_s": load_s, "look_s": time.perf_counter() - started, "image_rows": look.n_rows}


MEASURES: Final[dict[str, Callable[[Job], dict[str, Any]]]] = {
    "cold": _cold,
    "rows": _rows,
    "state": _state,
    "text": _text,
    "generation": _generation,
    "many": _many,
    "look": _look,
}


def _main() -> int:
    try:
        answer: dict[str, Any] = work(Job(**json.load(sys.stdin)))
    except LookonceError as error:
        answer = {"error": str(error), "bad_input": isinstance(error, InputError)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
