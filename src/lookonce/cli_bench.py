"""The command that measures: `lookonce bench`."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lookonce.cli_option import MODEL_HINT, JsonFlag, ModelOptions, PixelOptions, StoreFolder, gather
from lookonce.errors import InputError
from lookonce.synthetic.shape import shape_names
from lookonce.terminal import FAILURE, bar, status, write, write_json

if TYPE_CHECKING:
    from lookonce.bench import Report

__all__ = ["BENCH_EPILOG", "SHAPES", "bench"]

BENCH_EPILOG = f"""[dim]lookonce bench --model qwen3-vl-2b-instruct -i photo.jpg

lookonce bench --synthetic 2b --json > bench.json[/dim]

{MODEL_HINT}"""

SHAPES: Final = tuple(name for name in shape_names("qwen3vl") if name != "demo")  # that one is in the box, trained


@gather
def bench(
    *,
    load: ModelOptions,
    pixels: PixelOptions,
    store: StoreFolder = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", metavar="FILE", help="Default: drawn shapes, 512 x 512.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What is asked about it.")] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help=f"In place of a model: one of random weights, made at first use: {', '.join(SHAPES)}.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns that each takes.", show_default=True)] = 5,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of the long answer.", show_default=True)
    ] = 64,
    json_: JsonFlag = False,
) -> None:
    """Measure how fast a picture is answered here: cold, from rows, from state.

    The first token's time counts from the question on, the model being loaded;
    plain text after an equally long text is the floor. Each measurement is a
    process of its own, and all take turns. What is kept goes to a temporary
    folder in --store, and is deleted.
    """
    from lookonce.bench import MEASURES, QUESTION, Report, describe, lines, run_bench, save_picture
    from lookonce.bench_worker import Job
    from lookonce.look_plan import check_picture
    from lookonce.model_files import find_files
    from lookonce.retype import wanted_type

    if image is not None:
        check_picture(str(image))
    model, options = _model(load, synthetic)
    files = find_files(model, options["mmproj"], mmproj_type=options["mmproj_type"])
    if files.projector is not None:  # what was found here is what the processes are to measure
        options |= {"mmproj": str(files.projector.path.absolute()), "mmproj_type": wanted_type(options["mmproj_type"])}
    with _folder(store) as folder:
        job = Job(
            measure="",
            model=model,
            picture=str(image.absolute() if image else save_picture(folder)),
            prompt=QUESTION if prompt is None else prompt,
            store=str(folder),
            options=options,
            max_tokens=max_tokens,
            min_pixels=pixels.min_pixels,
            max_pixels=pixels.max_pixels,
        )
        facts = describe(files, job, rounds)
        with bar(total=rounds * len(MEASURES), what="Measuring") as advance:
            report = Report(facts, run_bench(job, rounds=rounds, advance=advance))
    _print(report, list(lines(report)), as_json=json_)
    if not report.same_answer:
        raise typer.Exit(FAILURE)


def _print(report: "Report", told: list[str], *, as_json: bool) -> None:
    if as_json:
        write_json(report.as_dict())
    else:
        write("\n".join(told) + "\n")


def _model(load: ModelOptions, synthetic: str | None) -> tuple[str, dict[str, Any]]:
    """What `lookonce.load` is to be given: the model, and the options beside the store."""
    names = ("mmproj", "mmproj_type", "device", "n_gpu_layers", "n_ctx", "threads", "kv_type")
    options = {name: getattr(load, name) for name in names}
    options["flash_attention"] = True if load.flash_attention else False if load.no_flash_attention else None
    if synthetic is not None:
        if load.mmproj is not None:
            raise InputError("--synthetic and --mmproj were both given: a model of random weights has its own")
        if load.model not in (None, os.environ.get("LOOKONCE_MODEL")):
            raise InputError("--synthetic and --model were both given: give one of them")
        text, projector = _synthetic(synthetic)
        return str(text), {**options, "mmproj": str(projector)}
    if load.model is None:
        raise InputError("no model was given: give --model NAME|FILE|FOLDER, set LOOKONCE_MODEL, or --synthetic 2b")
    return load.model, options


def _synthetic(shape: str) -> tuple[Path, Path]:
    """The pair of random weights, made in the user's cache where it is not there yet."""
    import platformdirs

    from lookonce.synthetic.pair import find_pair, make_pair, needed_bytes

    if shape not in SHAPES:
        raise InputError(f"there is no shape {shape!r}: choose one of {', '.join(SHAPES)}")
    folder = platformdirs.user_cache_path("lookonce") / "synthetic"
    if (found := find_pair(folder, shape=shape, type="Q4_K_M", mmproj_type="F16")) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_full_disk(folder, needed_bytes(shape=shape), f"a model of the shape {shape}")
        with status(f"Making a model of random weights of the shape {shape}, once: this takes minutes"):
            return make_pair(folder, shape=shape, type="Q4_K_M", mmproj_type="F16")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): make room there") from error


def refuse_full_disk(folder: Path, size_bytes: int, what: str) -> None:
    """Raise InputError where a folder's disk has not room for something."""
    import shutil

    from lookonce.byte_size import format_size

    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise InputError(f"{what} needs {format_size(size_bytes)} in {folder}, but {format_size(free)} are free there")


@contextlib.contextmanager
def _folder(named: Path | None) -> Iterator[Path]:
    """A temporary folder where the store would be: what is measured is that disk too."""
    import platformdirs

    parent = named or platformdirs.user_cache_path("lookonce")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=parent, prefix="bench-")
    except OSError as error:
        raise InputError(f"{parent} cannot be written to ({error.strerror or error}): give --store FOLDER") from error
    with made as folder:
        yield Path(folder)
