"""The commands that give numbers: `lookonce embed` and `lookonce extract`.

Imports no native library until a command needs one.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from lookonce.cli_option import (
    MODEL_HINT,
    JsonFlag,
    ModelOptions,
    PixelOptions,
    StoreOptions,
    VectorOptions,
    gather,
    open_store,
)
from lookonce.errors import InputError
from lookonce.terminal import bar, progress, status, write, write_json

if TYPE_CHECKING:
    from lookonce.embed_input import Row
    from lookonce.embed_run import EmbeddedBatch
    from lookonce.part_file import PartFile
    from lookonce.stages import Stages

__all__ = ["EMBED_EPILOG", "EXTRACT_EPILOG", "embed", "extract"]

_LOAD_OPTIONS = ("n_ctx", "kv_type", "flash_attention", "no_flash_attention", "device", "n_gpu_layers")
_CARD_OPTIONS: Final = ("pooling", "instruction", "prompt", "min_pixels", "max_pixels", "n_ctx")

EMBED_EPILOG = f"""[dim]lookonce embed "a cat" "a dog" -i cat.jpg --model qwen3-vl-2b-instruct

lookonce embed --input items.jsonl --output vectors.npy --skip-errors

cat items.jsonl | lookonce embed --input - --output vectors.jsonl --dimension 256[/dim]

{MODEL_HINT}"""

EXTRACT_EPILOG = f"""[dim]lookonce extract cat.jpg --outdir stages --model qwen3-vl-2b-instruct

lookonce extract cat.jpg dog.jpg --outdir stages --together --save-tokens[/dim]

{MODEL_HINT}"""


@gather
def embed(
    *,
    load: ModelOptions,
    keep: StoreOptions,
    pixels: PixelOptions,
    vectors: VectorOptions,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts, a vector each.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", "-i", metavar="IMAGE|SAVED", help="A picture or a saved look, a vector each; may be repeated."
        ),
    ] = None,
    input_: Annotated[
        str | None, typer.Option("--input", metavar="FILE|-", help="JSON lines instead; - reads stdin.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A .npy or .jsonl file. Default: stdout.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Rows, at most, that are kept together.", show_default=True)
    ] = 256,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Pass over what cannot be embedded.", show_default=False)
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an earlier run left to go on with.", show_default=False)
    ] = False,
) -> None:
    """Make vectors of texts, pictures, or both together.

    The vectors stand in the order given: the texts first, then the pictures.
    A line of --input is an object with text, image or images, and if you like
    id and instruction; names of pictures are relative to the working folder.

    A .npy file holds float32 (rows, dimension); JSON lines hold id, or else
    index (the row's number from 0), and vector.

    With --output a run that was killed goes on where it stopped when the same
    command is given again; FILE.part is what it left. --batch-size, --threads
    and --skip-errors may change meanwhile. A picture is known by its name.

    A row that cannot be embedded ends the run, and what was done is kept to go
    on with. With --skip-errors it is passed over, and beside a .npy file listed
    in FILE.skipped.jsonl.
    """
    from lookonce.embed_input import Source
    from lookonce.embed_run import embed_rows

    output = _checked_output(output, restart=restart)
    source = Source(tuple(texts or ()), tuple(image or ()), input_)
    with status("Reading the input"):
        total = source.check(output, skip_errors=skip_errors)
    with source.rows() as rows, load.load(store=keep.choice) as model:
        new_embedder = functools.partial(vectors.embedder, model, pixels)
        new_embedder().close()  # options that cannot be served are refused before a file is begun
        dependencies = functools.partial(_dependencies, load, keep, pixels, vectors)
        with _sink(output, dependencies, restart=restart) as sink, bar(total=total, what="Embedding") as advance:
            advance(sink.resume(rows))
            embed_rows(new_embedder, rows, sink, batch_size=batch_size, skip_errors=skip_errors, advance=advance)
        write(sink.summary())


def _checked_output(output: Path | None, *, restart: bool) -> Path | None:
    from lookonce.part_file import check_output

    if output is None:
        if restart:
            raise InputError("--restart was given without --output: only a run into a file can go on")
        return None
    output = output.expanduser()
    check_output(output)
    return output


def _sink(
    output: Path | None, dependencies: Callable[[], dict[str, object]], *, restart: bool
) -> "contextlib.AbstractContextManager[_Lines | PartFile]":
    if output is None:
        return contextlib.nullcontext(_Lines())
    from lookonce.part_file import PartFile

    return PartFile(output, dependencies(), restart=restart)


class _Lines:
    """Vectors as lines of JSON on stdout, each batch as soon as it is done."""

    def __init__(self) -> None:
        self._n_rows = self._n_vectors = 0

    def resume(self, rows: "Iterator[Row]") -> int:
        return 0

    def append(self, batch: "EmbeddedBatch") -> None:
        from lookonce.embed_run import format_vector

        self._n_rows += len(batch.rows)
        self._n_vectors += len(batch.kept)
        write("".join(format_vector(row, vector) for row, vector in zip(batch.kept, batch.vectors, strict=True)))

    def finish(self) -> None:
        from lookonce.embed_run import refuse_nothing

        refuse_nothing(self._n_rows, self._n_vectors)

    def summary(self) -> str:
        return ""


def _dependencies(
    load: ModelOptions, keep: StoreOptions, pixels: PixelOptions, vectors: VectorOptions
) -> dict[str, object]:
    """What vectors depend on, by the options' names. A thread more or less changes no more than rounding."""
    from lookonce.fingerprint import fingerprint_of, hash_files
    from lookonce.model_files import find_files

    opened = contextlib.nullcontext() if keep.no_store else open_store(keep.store)
    with status("Reading the model's fingerprint"), opened as store:
        files = find_files(cast(str, load.model), load.mmproj, mmproj_type=load.mmproj_type, store=store)
        facts: dict[str, object] = {
            "model": fingerprint_of(files.text, store),
            "mmproj": fingerprint_of(files.projector, store) if files.projector else None,
        }
    facts |= dataclasses.asdict(pixels) | dataclasses.asdict(vectors)
    if files.card is not None:
        facts |= {f"card's {name}": getattr(files.card, name) for name in _CARD_OPTIONS}
    facts["pca"] = None if vectors.pca is None else hash_files([vectors.pca])
    facts |= {name: getattr(load, name) for name in _LOAD_OPTIONS}
    return facts | {name: importlib.metadata.version(name) for name in ("lookonce", "llama-cpp-python", "pillow")}


@gather
def extract(
    *,
    load: ModelOptions,
    keep: StoreOptions,
    pixels: PixelOptions,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    outdir: Annotated[str, typer.Option(metavar="FOLDER", help="Where to save: each picture in FOLDER/its name/.")],
    save_tokens: Annotated[
        bool, typer.Option("--save-tokens", help="Save the tensors too, not only their means.", show_default=False)
    ] = False,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Stands after the pictures.", show_default=True)] = (
        "Describe the image."
    ),
    layer: Annotated[
        int, typer.Option(metavar="N", help="Whose output lm_last_hidden is: -1 is the last.", show_default=True)
    ] = -1,
    vision_layer: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Save this layer of the tower too, with --save-tokens; may be repeated."),
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="All pictures in one prompt.", show_default=False)
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Save what a picture becomes at each stage: tower, projector, text model.

    Each picture goes through with the prompt on its own, into a folder of its
    name with .npy files and manifest.json, which says what each file holds and
    which rows are system, text and picture. With --together all go in one
    prompt, into the folder of the first one's name. All are opened before the
    work begins: if one is bad, nothing is written.
    """
    from lookonce.look_plan import check_picture, plan_stages

    planned = plan_stages(images, outdir, together=together)
    if vision_layer and not save_tokens:
        raise InputError("--vision-layer was given without --save-tokens: a layer's tensor is saved only with it")
    for one in progress(images, total=len(images), what="Opening"):
        check_picture(one)
    with load.load(store=keep.choice) as model:
        from lookonce.stages import extract as extract_stages

        for plan in progress(planned, total=len(planned), what="Extracting"):
            with status(f"Extracting from {plan.pictures[0]}") if len(planned) == 1 else contextlib.nullcontext():
                stages = extract_stages(
                    model,
                    plan.pictures,
                    prompt=prompt,
                    layer=layer,
                    vision_layers=vision_layer or (),
                    min_pixels=pixels.min_pixels,
                    max_pixels=pixels.max_pixels,
                )
            manifest = stages.save(plan.folder, tokens=save_tokens)
            _print_stages(stages, manifest, json_)


def _print_stages(stages: "Stages", manifest: Path, as_json: bool) -> None:
    saved = json.loads(manifest.read_text(encoding="utf-8"))["tensors"]
    shapes = {name: tensor["shape"] for name, tensor in saved.items()}
    if as_json:
        write_json({"images": stages.pictures, "manifest": manifest, "shapes": shapes})
        return
    what = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
    write(f"{', '.join(stages.pictures)}: {what}, saved in {manifest.parent}\n")
