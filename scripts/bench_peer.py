"""What a benchmark's process does: one peer embeds one case and says how long it took. Started by `bench_embed.py`.

A peer is the library itself, llama-cpp-python's own `Llama.embed` on the same file, or transformers' model of the same
shape in BF16. All are given the same token ids.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lookonce.peak_memory import peak_bytes

__all__ = ["PEERS", "REFERENCE", "Job", "Measured", "make_inputs", "make_pictures", "make_reference", "work"]

REFERENCE = "transformers"  # which reads no GGUF

_PADDED_TOKENS = 2048  # of one transformers batch, padding included: more was not faster, and takes memory


@dataclass(frozen=True, slots=True)
class Job:
    """One peer's work: the files, and texts with the ids of their whole prompts, or pictures by width and height."""

    peer: str
    model: str
    mmproj: str
    shape: str
    threads: int
    texts: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    pictures: list[tuple[int, int]] = field(default_factory=list)
    store: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a peer took: seconds for all, Python's part of them (0 where it is not measured), peak resident bytes."""

    seconds: float
    python_seconds: float
    peak_bytes: int


def work(job: Job) -> Measured:
    """Do a job in this process."""
    seconds, python_seconds = PEERS[job.peer](job)
    return Measured(seconds, python_seconds, peak_bytes())


def make_pictures(sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """Noise, each picture another."""
    return [
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for seed, (width, height) in enumerate(sizes)
    ]


class _NativeTime:
    """Sums up the time of native calls, and that of Python's callback within them."""

    def __init__(self) -> None:
        self.native = 0.0
        self.callback = 0.0

    def watch(self, module: Any, name: str) -> None:
        """Replace a native function by one that is timed."""
        real = getattr(module, name)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*arguments)
            finally:
                self.native += time.perf_counter() - started

        setattr(module, name, timed)

    def watch_callback(self, capture: Any) -> None:
        """Replace the evaluation callback of contexts that are made from now on."""
        real = capture._on_tensor

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*arguments)
            finally:
                self.callback += time.perf_counter() - started

        capture._on_tensor = timed


def _lookonce(job: Job) -> tuple[float, float]:
    import llama_cpp.llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd

    import lookonce
    from lookonce.item import Item
    from lookonce.native import capture

    watch = _NativeTime()
    for module, names in {
        llama: ("llama_decode", "llama_init_from_model", "llama_memory_seq_cp", "llama_memory_seq_rm"),
        mtmd: ("mtmd_encode_chunk", "mtmd_tokenize", "mtmd_init_from_file"),
    }.items():
        for name in names:
            watch.watch(module, name)
    watch.watch_callback(capture.Capture)
    store: Any = job.store or False
    with lookonce.load(job.model, mmproj=job.mmproj, threads=job.threads, store=store, device="cpu") as model:
        pictures = make_pictures(job.pictures)
        with lookonce.Embedder(model, min_pixels=4096) as other:  # what it has evaluated is no part of what is timed
            other.embed_text("warm")
            if pictures and not job.store:
                other.embed_image(np.zeros((64, 64, 3), dtype=np.uint8))
        embedder = lookonce.Embedder(model, min_pixels=4096)
        before = watch.native - watch.callback
        started = time.perf_counter()
        items: list[str | Item] = [*job.texts]
        items += [{"image": picture} for picture in pictures]
        embedder.embed_batch(items)
        seconds = time.perf_counter() - started
    return seconds, seconds - (watch.native - watch.callback - before)


def _llama(job: Job) -> tuple[float, float]:
    import llama_cpp

    longest = max(map(len, job.prompts))
    batch = max(512, -(-longest // 256) * 256)  # it cuts what is longer than a batch
    llama = llama_cpp.Llama(
        job.model,
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_LAST,
        n_ctx=batch,
        n_batch=batch,
        n_ubatch=batch,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        verbose=False,
    )
    # It would split the names of special tokens as text, which are more tokens than the same prompt has.
    ids = {str(number): prompt for number, prompt in enumerate([[1], *job.prompts])}
    llama.tokenize = lambda text, *_, **__: ids[text.decode()]
    llama.embed("0")
    started = time.perf_counter()
    llama.embed([str(number) for number in range(1, len(ids))], normalize=True)
    return time.perf_counter() - started, 0.0


def _transformers(job: Job) -> tuple[float, float]:
    import torch

    torch.set_num_threads(job.threads)
    model = make_reference(job.shape)
    pictures = make_pictures(job.pictures)
    with torch.inference_mode():
        model(input_ids=torch.ones((1, 8), dtype=torch.long))
        started = time.perf_counter()
        for batch in _padded_batches(job.prompts):
            ids = torch.zeros((len(batch), max(map(len, batch))), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, : len(prompt)] = torch.tensor(prompt)
                mask[row, : len(prompt)] = 1
            states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = states[torch.arange(len(batch)), mask.sum(1) - 1].float()
            vectors = torch.nn.functional.normalize(last, dim=-1).numpy()
        for picture in pictures:
            states = model(**make_inputs(picture), use_cache=False).last_hidden_state
            vectors = torch.nn.functional.normalize(states[:, -1].float(), dim=-1).numpy()
        seconds = time.perf_counter() - started
    if not np.isfinite(vectors).all():
        raise RuntimeError("transformers gave vectors that are not finite")
    return seconds, 0.0


def _padded_batches(prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    """Prompts of like length together, as many as give `_PADDED_TOKENS`."""
    batches: list[list[list[int]]] = []
    for prompt in sorted(prompts, key=len, reverse=True):
        if not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > _PADDED_TOKENS:
            batches.append([])
        batches[-1].append(prompt)
    return batches


def make_reference(name: str, *, head: bool = False) -> Any:
    """A Qwen3-VL of transformers, in BF16, with random weights; with `head` one that generates."""
    import torch
    import transformers

    from lookonce.synthetic.shape import find_shape

    shape = find_shape("qwen3vl", name)
    text, vision = shape.text, shape.vision
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "max_position_embeddings": text.context_length,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.mrope_section),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.heads,
            "intermediate_size": vision.intermediate_size,
            "patch_size": vision.patch_size,
            "out_hidden_size": text.hidden_size,
            "num_position_embeddings": vision.n_positions,
            "deepstack_visual_indexes": list(vision.deepstack),
        },
        tie_word_embeddings=text.tied,
        image_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
    )
    with torch.device("meta"):
        kind = transformers.AutoModelForImageTextToText if head else transformers.AutoModel
        model = kind.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    # Buffers hold frequencies: those are made in earnest, on the layers alone.
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    _make_buffers(model)
    return model


def _make_buffers(model: Any) -> None:
    """Make every rotary embedding anew: on the meta device their frequencies were never computed."""
    import torch

    for module in list(model.modules()):
        if not list(module.buffers(recurse=False)):
            continue
        fresh = type(module)(module.config) if hasattr(module, "config") else type(module)(module.dim)
        for name, buffer in fresh.named_buffers(recurse=False):
            if not torch.isfinite(buffer).all():
                raise RuntimeError(f"{type(module).__name__} was not made anew")
            module.register_buffer(name, buffer, persistent=False)


def make_inputs(
    picture: NDArray[np.uint8], *, before: int = 28, after: int = 5, pixels: tuple[int, int] = (4096, 1_843_200)
) -> dict[str, Any]:
    """A picture as the processor gives it, between tokens: as many as the embedding prompt has, unless told."""
    import torch
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": pixels[0], "longest_edge": pixels[1]},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    made = processor(Image.fromarray(picture), return_tensors="pt")
    rows = int(made["image_grid_thw"].prod()) // 4
    ids = torch.tensor([[*range(10, 10 + before), 2, *[1] * rows, 3, *range(10, 10 + after)]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 1).int(),
        "pixel_values": made["pixel_values"].to(torch.bfloat16),
        "image_grid_thw": made["image_grid_thw"],
    }


PEERS: dict[str, Callable[[Job], tuple[float, float]]] = {
    "lookonce": _lookonce,
    "llama-cpp-python": _llama,
    REFERENCE: _transformers,
}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    given["pictures"] = [tuple(size) for size in given["pictures"]]
    print(json.dumps(asdict(work(Job(**given)))))
