"""The command that fetches a model: `lookonce pull`.

Loads no hub's client before it is run, and no native library at all.
"""

import shlex
from typing import TYPE_CHECKING, Annotated, cast

import typer

from lookonce.byte_size import format_size
from lookonce.cli_option import JsonFlag, gather
from lookonce.errors import InputError
from lookonce.hub import TITLES
from lookonce.terminal import byte_bars, write, write_error, write_json

if TYPE_CHECKING:
    from lookonce.cards import ModelCard
    from lookonce.download import PulledFile, PulledFiles, PullStep, SourceChoice

__all__ = ["PULL_EPILOG", "fetch", "pull_model"]

PULL_EPILOG = """[dim]lookonce pull qwen3-vl-2b-instruct

lookonce pull qwen3-vl-8b-instruct --quant Q8_0 --source modelscope --to models[/dim]

HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and their like of ModelScope are respected."""


@gather
def pull_model(
    *,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A card's name, or NAME:QUANT; lookonce models list shows them.")
    ],
    quant: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Quantization of the text model. Default: the card's first.")
    ] = None,
    mmproj_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the projector file. Default: the card's first.")
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            metavar="HUB", help="auto, huggingface or modelscope; auto asks the second where the first is out of reach."
        ),
    ] = "auto",
    to: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Put the files here. Default: the hub's own cache.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Fetch a model's two files, verified by size and SHA-256.

    Prints their paths. What was cut off is gone on with; what is there is not
    fetched again. Nothing but a partial file is ever deleted.
    """
    fetch(name, quant=quant, projector_type=mmproj_type, source=source, folder=to, as_json=json_)


def fetch(
    name: str, *, quant: str | None, projector_type: str | None, source: str, folder: str | None, as_json: bool
) -> None:
    """Pull the files of the card of that name with bars on a terminal, and print where they are."""
    from lookonce.cards import choose_card
    from lookonce.download import pull

    card, named_quant = choose_card(name)
    if None not in (quant, named_quant) and str(quant).lower() != str(named_quant).lower():
        raise InputError(f"{name} and --quant {quant} were both given: give one quantization")
    quant = quant or named_quant
    with byte_bars() as move:

        def show(step: "PullStep") -> None:
            move(step.file, _DOING[step.doing], step.done_bytes, step.total_bytes)

        pulled = pull(
            card,
            quant=quant,
            projector_type=projector_type,
            source=cast("SourceChoice", source),  # pull refuses others with the list of them
            folder=folder,
            progress=show,
        )
    files = {"text": pulled.text_file, "projector": pulled.projector_file}
    if as_json:
        write_json({"name": card.name, **{kind: _facts(file) for kind, file in files.items()}})
    else:
        write_error(f"{card.name}: {_summary(card, pulled)}")
        write("".join(f"{file.path}\n" for file in files.values()))
        if folder is not None:
            write_error(_use(card.name if quant is None else f"{card.name}:{quant}", pulled))


def _use(name: str, pulled: "PulledFiles") -> str:
    """How to use what was put into a folder of the user's own."""
    from lookonce.model_folders import folders

    folder = pulled.text.parent
    if folder in folders():
        return f"to use it: --model {name}"
    alone = len(list(folder.glob("*.gguf"))) == len({pulled.text, pulled.projector})
    path = shlex.quote(str(folder if alone else pulled.text))
    return f"to use it: --model {path}, or LOOKONCE_MODELS_DIR={shlex.quote(str(folder))} and --model {name}"


_DOING = {"fetching": "Fetching", "checking": "Checking", "waiting": "Another process fetches"}


def _facts(file: "PulledFile") -> dict[str, object]:
    return {"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256, "source": file.source}


def _summary(card: "ModelCard", pulled: "PulledFiles") -> str:
    if card.folder is not None:
        return "nothing to fetch"
    told = []
    for source in dict.fromkeys((pulled.text_file.source, pulled.projector_file.source)):
        size_bytes = sum(one.size_bytes for one in (pulled.text_file, pulled.projector_file) if one.source == source)
        whence = f"fetched from {TITLES[source]}" if source else "on the disk already"
        told.append(f"{format_size(size_bytes)} {whence}")
    return f"{', '.join(told)}, verified"
