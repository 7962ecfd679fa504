"""The command line: parse, call, print.

Imports no native library until a command needs one, so that `--help` answers at once.
"""

import contextlib
import dataclasses
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lookonce.byte_size import format_size, parse_size
from lookonce.cli_bench import BENCH_EPILOG, bench
from lookonce.cli_demo import DEMO_EPILOG, demo
from lookonce.cli_models import models_app
from lookonce.cli_option import (
    MODEL_HINT,
    JsonFlag,
    ModelOptions,
    PixelOptions,
    SampleOptions,
    StoreFolder,
    StoreOptions,
    gather,
    open_store,
)
from lookonce.cli_pull import PULL_EPILOG, pull_model
from lookonce.cli_vectors import EMBED_EPILOG, EXTRACT_EPILOG, embed, extract
from lookonce.errors import InputError, StoreError
from lookonce.terminal import CLOSED_PIPE, FAILURE, Terminal, progress, status, write, write_json
from lookonce.version import VERSION

if TYPE_CHECKING:
    from lookonce.embedding import ImageEmbedding
    from lookonce.looker import RowType

__all__ = ["app", "main"]

logger = logging.getLogger(__name__)

# Click's base of all usage errors, or typer's own copy of it: which one depends on typer's version.
_UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="lookonce",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
store_app = typer.Typer(help="See, check, shrink or empty the store of looks and states.")
app.add_typer(store_app, name="store")
app.add_typer(models_app, name="models")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status."""
    terminal = Terminal("lookonce")
    return terminal.run(lambda: _dispatch(sys.argv[1:] if arguments is None else list(arguments), terminal))


def _dispatch(arguments: list[str], terminal: Terminal) -> int:
    try:
        result = app(args=arguments, prog_name="lookonce", standalone_mode=False, obj=terminal)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except SystemExit as error:  # typer's way with a closed pipe while it prints its help
        return CLOSED_PIPE if error.code else 0
    except _UsageProblem as error:
        message = cast(Any, error).format_message()
        remedy = "lookonce --help and lookonce COMMAND --help show what there is"
        raise InputError(f"{message.rstrip('.')}: {remedy}") from error
    return result if isinstance(result, int) else 0


def _say_version(wanted: bool) -> None:
    if wanted:
        write(f"lookonce {VERSION}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def lookonce(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Look at a picture once. Ask about it for ever, on a CPU.

    [dim]lookonce ask "What is this?" -i photo.jpg --model qwen3-vl-2b-instruct[/dim]

    Results go to stdout, everything else to stderr. Exit status: 0; 2 for wrong
    use or bad input; 1 for other failures.
    """
    if context.invoked_subcommand is None:
        write(context.get_help() + "\n")


@app.command(
    epilog=f"""[dim]lookonce look cat.jpg --model qwen3-vl-2b-instruct --output cat.safetensors

lookonce look photos/*.jpg --model qwen3-vl-2b-instruct --output looks/[/dim]

{MODEL_HINT}"""
)
@gather
def look(
    *,
    load: ModelOptions,
    keep: StoreOptions,
    pixels: PixelOptions,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures, or saved looks.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE|FOLDER/", help="Where to save. Default: the store alone."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="f16|f32", help="The type in which rows are kept.")] = "f16",
    json_: JsonFlag = False,
) -> None:
    """Look at pictures and keep what was seen, in the store and in files.

    One picture is saved as FILE (.safetensors, or .pt with torch); any number
    in FOLDER/, each under its own name with .safetensors. All are opened before
    the first is looked at: if one is bad, none is looked at, nothing written.
    """
    from lookonce.look_plan import check_picture, plan_looks

    planned = plan_looks(images, output)
    if keep.choice is False and output is None:
        raise InputError("with --no-store the looks would go nowhere: give --output FILE|FOLDER")
    for one in progress(planned, total=len(planned), what="Opening"):
        check_picture(one.picture)
    with load.load(store=keep.choice) as model:
        lost = []
        for one in progress(planned, total=len(planned), what="Looking"):
            with status(f"Looking at {one.picture}") if len(planned) == 1 else contextlib.nullcontext():
                seen = model.look(
                    one.picture,
                    min_pixels=pixels.min_pixels,
                    max_pixels=pixels.max_pixels,
                    dtype=cast("RowType", dtype),
                )
            if one.target is not None:
                one.target.parent.mkdir(exist_ok=True)
                seen.save(one.target)
            elif not model.engine.looker.keeps(seen):
                lost.append(one.picture)
            _print_look(one.picture, seen, one.target, json_)
    if lost:
        raise StoreError(f"the store kept no look of {', '.join(lost)}: mend the store, or give --output FILE|FOLDER/")


def _print_look(picture: str, seen: "ImageEmbedding", target: Path | None, as_json: bool) -> None:
    if as_json:
        facts = {name: getattr(seen, name) for name in ("key", "source", "grid", "width")}
        write_json({"image": picture, "output": target, "rows": seen.n_rows, **facts})
        return
    saved = f", saved as {target}" if target else ""
    rows, columns = seen.grid
    write(f"{picture}: {seen.n_rows} rows ({rows} x {columns}), source {seen.source}{saved}\n")


@app.command(
    epilog=f"""[dim]lookonce ask "What colour is the cat?" -i cat.jpg --model qwen3-vl-2b-instruct

lookonce ask "Compare <image_1> with <image_2>." -i cat.safetensors -i dog.jpg --json

echo "Describe it." | lookonce ask - -i cat.jpg --temperature 0[/dim]

{MODEL_HINT}"""
)
@gather
def ask(
    *,
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    load: ModelOptions,
    keep: StoreOptions,
    pixels: PixelOptions,
    sampling: SampleOptions,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="IMAGE|SAVED", help="A picture or a saved look; may be repeated."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    state: Annotated[
        str,
        typer.Option(
            metavar="off|read|on",
            help="on: evaluated pictures are kept in the store and used again; read: only used; off: neither.",
            show_default=True,
            rich_help_panel="Store",
        ),
    ] = "on",
    json_: JsonFlag = False,
) -> None:
    """Ask about pictures, saved looks, or nothing but text.

    The answer appears as it is generated. With --json it comes at the end: one
    object with text, finish_reason, usage, timings and images. A picture stands
    where <image_1>, <image_2> ... stand in the prompt, else before its text.
    """
    options = sampling.options()
    question = _read_prompt() if prompt == "-" else prompt
    with load.load(store=keep.choice, state=state) as model:
        with status("Looking and reading"):
            stream = model.ask(
                question,
                images=image or [],
                system=system,
                min_pixels=pixels.min_pixels,
                max_pixels=pixels.max_pixels,
                stream=True,
                **options,
            )
            first = next(stream, "")
        with stream:
            for piece in itertools.chain([first], stream):
                if not json_:
                    write(piece)
        if json_:
            write_json(dataclasses.asdict(stream.reply))
            return
        write("\n")
        reply = stream.reply
        if reply.finish_reason == "length":
            logger.warning("the answer is cut off after %d tokens: --max-tokens gives it more", reply.usage.generated)


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError("the prompt on stdin is not UTF-8: give it as UTF-8 text") from error


app.command(epilog=BENCH_EPILOG)(bench)
app.command(epilog=DEMO_EPILOG)(demo)
app.command(epilog=EMBED_EPILOG)(embed)
app.command(epilog=EXTRACT_EPILOG)(extract)
app.command("pull", epilog=PULL_EPILOG)(pull_model)


@store_app.callback(invoke_without_command=True)
def store(context: typer.Context) -> None:
    """See, check, shrink or empty the store of looks and states."""
    if context.invoked_subcommand is None:
        write(context.get_help() + "\n")


@store_app.command()
@gather
def stats(store: StoreFolder = None, json_: JsonFlag = False) -> None:
    """Count what the store holds."""
    with open_store(store) as opened:
        found = opened.stats()
    facts = {"folder": str(found.folder), "entries": found.entries, "size_bytes": found.size_bytes}
    if json_:
        kinds = {kind: dataclasses.asdict(one) for kind, one in found.kinds.items()}
        write_json({**facts, "limit_bytes": found.limit_bytes, "kinds": kinds})
        return
    write(f"{found.folder}\nentries: {found.entries}, ")
    write(f"{format_size(found.size_bytes)} of at most {format_size(found.limit_bytes)}\n")
    for kind, one in found.kinds.items():
        write(f"  {kind}: {one.entries}, {format_size(one.size_bytes)}\n")


@store_app.command()
@gather
def check(
    store: StoreFolder = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete damaged and outdated entries, and left-over files.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Read every entry and report what is damaged.

    Status 1 where something is and --repair was not given. A damaged entry
    is never used: its picture is looked at or evaluated again.
    """
    with open_store(store) as opened:
        report = opened.check(repair=repair)
    if json_:
        write_json({**dataclasses.asdict(report), "sound": report.sound})
    else:
        write(f"entries read: {report.checked}, {'sound' if report.sound else 'damaged'}\n")
        if report.index_damaged:
            write("the index was damaged, and was made again from the entries\n")
        for what in ("corrupt", "outdated", "missing", "orphans", "temporaries"):
            for name in getattr(report, what):
                write(f"  {what}: {name}\n")
    if not report.sound and not repair:
        if not json_:
            write("lookonce store check --repair deletes what is damaged\n")
        raise typer.Exit(FAILURE)


@store_app.command(epilog="[dim]lookonce store prune --limit 5GB[/dim]")
@gather
def prune(
    store: StoreFolder = None,
    limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="500MB, 5GB ... Default: the store's own limit.")
    ] = None,
) -> None:
    """Delete what was used least recently until the rest fits the limit."""
    limit_bytes = None if limit is None else parse_size(limit)
    with open_store(store) as opened:
        write(f"{format_size(opened.prune(limit_bytes))} freed\n")


@store_app.command()
@gather
def clear(
    store: StoreFolder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete every look and state in the store. Files of your own stay."""
    with open_store(store) as opened:
        if not yes:
            if not sys.stdin.isatty():
                raise InputError(f"clearing the store {opened.folder} needs a yes: give --yes")
            count = opened.stats().entries
            if not typer.confirm(f"Delete all {count} in {opened.folder}?", err=True):
                raise typer.Exit(FAILURE)
        write(f"{format_size(opened.clear())} freed\n")


@app.command()
@gather
def doctor(load: ModelOptions, store: StoreFolder = None, json_: JsonFlag = False) -> None:
    """Show versions, CPU, devices, models found and the store.

    With --model also check that a picture changes the model's answer; status 1
    where it does not. That no model is found is no failure.
    """
    from lookonce import doctor as doctor_

    report = doctor_.examine(load.model, store)
    if not json_:
        write("\n".join(doctor_.lines(report)) + "\n")
    if load.model is not None and not report.native.problem:
        report = dataclasses.replace(report, check=doctor_.check_model(lambda: load.load(store=False)))
    if json_:
        write_json(report.as_dict())
    elif report.check is not None:
        write("\n".join(doctor_.check_lines(report.check)) + "\n")
    if report.native.problem or (report.check is not None and not report.check.passed):
        raise typer.Exit(FAILURE)
