"""What another tool's process does in the comparison: it answers one question about one picture, and says how long it
took. Started by `bench_peers.py` with a job on stdin.

llama-cpp-python runs through its own chat handler on the same two files, transformers on a model of the same shape in
BF16, with as many tokens and image tokens in the prompt. Both answer something else first, as Lookonce's processes do.
"""

import base64
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench_peer import make_inputs, make_reference
from lookonce.peak_memory import peak_bytes

__all__ = ["PEERS", "Job"]

_CHAT_PIXELS = (65_536, 16_777_216)  # the limits of Qwen3-VL's own processor
_BATCH = 512  # as Lookonce's


@dataclass(frozen=True, slots=True)
class Job:
    """One peer's work. `text_tokens` is what Lookonce's prompt has beside the image rows, for transformers."""

    peer: str
    model: str
    mmproj: str
    shape: str
    picture: str
    prompt: str
    threads: int
    n_ctx: int
    max_tokens: int
    text_tokens: int


def _llama(job: Job) -> dict[str, Any]:
    import llama_cpp
    import llama_cpp.mtmd_cpp as mtmd
    from llama_cpp.llama_chat_format import MTMDChatHandler

    started = time.perf_counter()
    llama = llama_cpp.Llama(
        job.model,
        chat_handler=MTMDChatHandler(clip_model_path=job.mmproj, verbose=False),
        n_ctx=job.n_ctx,
        n_batch=_BATCH,
        n_ubatch=_BATCH,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        flash_attn=True,
        verbose=False,
    )
    load_s = time.perf_counter() - started
    counted = _Counted(llama, mtmd)
    _stream(llama, _as_url(Image.new("RGB", (256, 256))), "Hello.", 2)
    url = _as_url(Image.open(job.picture).convert("RGB"))
    counted.clear()
    text, times = _stream(llama, url, job.prompt, job.max_tokens)
    prompt = counted.prompt()
    _, again = _stream(llama, url, job.prompt, 1)
    return {
        "text": text,
        "load_s": load_s,
        "first_token_s": times[0],
        "again_s": again[0],
        "rate": _rate(times),
        **prompt,
        "did": f"MTMDChatHandler, flash_attn=True, n_batch and n_ubatch {_BATCH}, {job.threads} threads, "
        "the picture resized by libmtmd",
    }


def _stream(llama: Any, url: str, prompt: str, max_tokens: int) -> tuple[str, list[float]]:
    """The answer, and when each of its pieces came, in seconds after the question."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    started = time.perf_counter()
    stream = llama.create_chat_completion(
        [{"role": "user", "content": content}],
        stream=True,
        temperature=0.0,
        repeat_penalty=1.0,
        max_tokens=max_tokens,
    )
    text, times = "", []
    for chunk in stream:
        if piece := chunk["choices"][0]["delta"].get("content"):
            text += piece
            times.append(time.perf_counter() - started)
    if not times:
        raise RuntimeError("llama-cpp-python answered nothing")
    return text, times


def _rate(times: list[float]) -> float | None:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


class _Counted:
    """Counts what the handler evaluates, by its own calls."""

    def __init__(self, llama: Any, mtmd: Any) -> None:
        self._text: list[int] = []
        self._image: list[int] = []
        evaluate, complete, count = llama.eval, llama.create_completion, mtmd.mtmd_input_chunk_get_n_tokens
        self._prompting = True

        def eval_(tokens: Any) -> None:
            if self._prompting:
                self._text.append(len(tokens))
            evaluate(tokens)

        def create_completion(*arguments: Any, **options: Any) -> Any:
            self._prompting = False
            return complete(*arguments, **options)

        def n_tokens(chunk: Any) -> int:
            found = int(count(chunk))
            self._image.append(found)
            return found

        llama.eval, llama.create_completion, mtmd.mtmd_input_chunk_get_n_tokens = eval_, create_completion, n_tokens

    def clear(self) -> None:
        """Forget what was counted."""
        self._text.clear()
        self._image.clear()
        self._prompting = True

    def prompt(self) -> dict[str, int]:
        """Tokens of the prompt since then."""
        return {"text_tokens": sum(self._text), "image_rows": sum(self._image)}


def _as_url(picture: Image.Image) -> str:
    import io

    data = io.BytesIO()
    picture.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _transformers(job: Job) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(job.threads)
    started = time.perf_counter()
    model = make_reference(job.shape, head=True)
    load_s = time.perf_counter() - started
    times: list[float] = []

    class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    def generate(picture: Image.Image, after: int, count: int) -> tuple[float, int]:
        began = time.perf_counter()
        inputs = make_inputs(np.asarray(picture.convert("RGB")), before=3, after=after, pixels=_CHAT_PIXELS)
        times.clear()
        with torch.inference_mode():
            model.generate(
                **inputs,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([Clock()]),
            )
        return began, int((inputs["input_ids"] == 1).sum())

    model.generation_config.eos_token_id = None
    generate(Image.new("RGB", (256, 256)), 5, 2)
    began, rows = generate(Image.open(job.picture), max(1, job.text_tokens - 5), job.max_tokens)
    found = [at - began for at in times]
    return {
        "load_s": load_s,
        "first_token_s": found[0],
        "rate": _rate(found),
        "text_tokens": job.text_tokens,
        "image_rows": rows,
        "did": f"generate in BF16 with SDPA, {job.threads} threads, random weights, its own processor",
    }


PEERS: dict[str, Callable[[Job], dict[str, Any]]] = {"llama-cpp-python": _llama, "transformers": _transformers}


def _main() -> int:
    job = Job(**json.load(sys.stdin))
    answer = PEERS[job.peer](job)
    print(json.dumps({**answer, "peak_bytes": peak_bytes()}))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(_main())
