"""The command that shows the library at work: `lookonce demo`."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookonce.cli_option import MODEL_HINT, SMALLEST, JsonFlag, ModelOptions, PixelOptions, gather
from lookonce.errors import InputError
from lookonce.terminal import FAILURE, write, write_json

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DEMO_EPILOG", "demo"]

DEMO_EPILOG = f"""[dim]lookonce demo

lookonce demo --seed 7 --save-picture scene.png

lookonce demo --model {SMALLEST} --image cat.jpg --prompt "What is the cat doing?"[/dim]

{MODEL_HINT}"""


@gather
def demo(
    *,
    load: ModelOptions,
    pixels: PixelOptions,
    image: Annotated[
        str | None, typer.Option("--image", "-i", metavar="FILE", help="Default: a drawn scene of shapes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Draw another scene.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to ask, may be repeated. Default: three questions.")
    ] = None,
    save_picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the picture that is asked about, as PNG.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """See it work: a picture asked about cold, then from the store, then found.

    Looks, asks three questions, asks them again of a model loaded anew, and
    ranks four captions. The second time no vision tower is loaded. Uses a store
    of its own, gone afterwards, and without --model the small model in the
    package, which knows drawn shapes and nothing else. What it answers wrongly
    is called so; the status is 1 only where the store changed an answer or was
    not used.
    """
    if image is not None and seed is not None:
        raise InputError("--image and --seed were both given: a given picture is not drawn, give one of them")
    if any(not one.strip() for one in prompt or ()):
        raise InputError("--prompt is empty: give a question, or leave it out")
    from lookonce.demo import DEMO_MODEL, DEMO_SEED, draw_subject, open_subject, run_demo
    from lookonce.looker import LookOptions

    if image is None:
        subject = draw_subject(DEMO_SEED if seed is None else seed, prompt or ())
    else:
        subject = open_subject(image, prompt or ())
    if save_picture is not None:
        _save(subject.picture, save_picture)
    model = load.model or DEMO_MODEL
    if image is not None and model == DEMO_MODEL:
        subject = dataclasses.replace(subject, told=f"{image}, of which this small model speaks as of drawn shapes")
    wanted = dataclasses.replace(load, model=model)
    result = run_demo(
        lambda store: wanted.load(store=store),
        subject,
        LookOptions(pixels.min_pixels, pixels.max_pixels),
        lambda line: None if json_ else write(line + "\n"),
    )
    if json_:
        write_json(result.as_dict())
    else:
        write("\n" + _next_steps(None if model == DEMO_MODEL else model))
    if not result.passed:
        raise typer.Exit(FAILURE)


def _save(picture: "Image.Image", path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError(f"{str(path)!r} is no name for the picture: end it in .png")
    try:
        picture.save(path, "PNG")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{str(path)!r} cannot be written ({reason}): give a file in a folder of your own") from error


def _next_steps(model: str | None) -> str:
    """What to run next: with that model, or with one to be fetched."""
    named = SMALLEST if model is None else shlex.quote(model)
    steps = [
        f'lookonce ask "What is this?" -i photo.jpg --model {named}',
        f"lookonce demo --image photo.jpg --model {named}",
    ]
    title = "Next, with pictures of your own:"
    if model is None:
        title = "Next, a model that knows the world:"
        steps.insert(0, f"lookonce pull {SMALLEST}")
    return "\n".join([title, *(f"   {step}" for step in steps)]) + "\n"
