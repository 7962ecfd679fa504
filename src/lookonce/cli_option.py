"""The options that several commands share, each written once.

A command names a dataclass of this module as a parameter, and `gather` turns its fields into options. Knows
nothing of what the commands do; loads no model library before `ModelOptions.load`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from lookonce.errors import InputError
from lookonce.terminal import Terminal, status

if TYPE_CHECKING:
    from lookonce.embed_prompt import PromptStyle
    from lookonce.embedder import Embedder, PooledTokens
    from lookonce.model import Model
    from lookonce.pooling import Pooling
    from lookonce.sampling import SamplingOptions
    from lookonce.store import Store

__all__ = [
    "MODEL_HINT",
    "SMALLEST",
    "JsonFlag",
    "ModelOptions",
    "PixelOptions",
    "SampleOptions",
    "StoreFolder",
    "StoreOptions",
    "VectorOptions",
    "Verbose",
    "gather",
    "open_store",
]

SMALLEST = "qwen3-vl-2b-instruct"  # of the models that answer, the one to begin with
MODEL_HINT = "Set LOOKONCE_MODEL to leave --model out."

_MODEL, _STORE, _REPLY, _VECTOR = "Model", "Store", "Reply", "Vector"


def _be_verbose(context: typer.Context, value: bool) -> bool:
    if value and isinstance(context.obj, Terminal):
        context.obj.be_verbose()
    return value


Verbose = Annotated[
    bool,
    typer.Option("--verbose", callback=_be_verbose, is_eager=True, help="Show the log and tracebacks on stderr."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="FOLDER",
        file_okay=False,
        help="Keep looks and states here. Default: $LOOKONCE_STORE, else the user's cache.",
        rich_help_panel=_STORE,
    ),
]


def gather(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` one option for each field of each dataclass among its parameters, and `--verbose`."""
    shown: list[inspect.Parameter] = []
    gathered: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        if is_dataclass(parameter.annotation):
            gathered[parameter.name] = cast(type, parameter.annotation)
            shown += _parameters(gathered[parameter.name])
        else:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    shown.append(inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose))

    @wraps(command)
    def expanded(**given: Any) -> None:
        del given["verbose"]
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in gathered.items()
        }
        command(**made, **given)

    vars(expanded)["__signature__"] = inspect.Signature(shown)
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return expanded


def _parameters(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default_factory() if callable(field.default_factory) else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|FOLDER",
            envvar="LOOKONCE_MODEL",
            help="A card's name (see lookonce models list), the text model's .gguf file, or a folder that holds it.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    mmproj: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            envvar="LOOKONCE_MMPROJ",
            help="Its projector file. Default: the card's, or the one beside the model that fits.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    mmproj_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Use the projector of this type that models retype made: BF16, F16, Q8_0, or auto, its last. "
            "Default: $LOOKONCE_MMPROJ_TYPE, else the card's.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, cpu, cuda, cuda:0 or metal.", show_default=True, rich_help_panel=_MODEL
        ),
    ] = "auto"
    n_gpu_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Layers on the GPU. Default: all.", rich_help_panel=_MODEL)
    ] = None
    n_ctx: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens and image rows that the context holds. Default: 8192.", rich_help_panel=_MODEL
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="CPU threads. Default: the physical cores.", rich_help_panel=_MODEL),
    ] = None
    kv_type: Annotated[
        str,
        typer.Option(metavar="TYPE", help="Type of the KV cache: f16, f32 or q8_0.", rich_help_panel=_MODEL),
    ] = "f16"
    flash_attention: Annotated[
        bool,
        typer.Option("--flash-attention", help="Force it on. Default: llama.cpp chooses.", rich_help_panel=_MODEL),
    ] = False
    no_flash_attention: Annotated[
        bool, typer.Option("--no-flash-attention", help="Force it off.", rich_help_panel=_MODEL)
    ] = False

    def load(self, *, store: "Store | Path | bool", state: str = "on") -> "Model":
        """Load the model; `store` is what `StoreOptions` or the command says, `state` what `ask` says.

        Raises InputError where no model was given, and what `lookonce.load` raises.
        """
        if self.model is None:
            raise InputError(
                f"no model was given: give --model NAME|FILE|FOLDER, or set LOOKONCE_MODEL; `lookonce pull {SMALLEST}` "
                "fetches one, and --model demo is in the box"
            )
        if self.flash_attention and self.no_flash_attention:
            raise InputError("--flash-attention and --no-flash-attention were both given: give one of them")
        with status(f"Loading {self.model}"):
            from lookonce.model import load
            from lookonce.native.text import KvType
            from lookonce.prefix_store import StateMode

            return load(
                self.model,
                mmproj=self.mmproj,
                mmproj_type=self.mmproj_type,
                device=self.device,
                n_gpu_layers=self.n_gpu_layers,
                n_ctx=self.n_ctx,
                threads=self.threads,
                kv_type=cast(KvType, self.kv_type),  # load refuses another with the list of them
                flash_attention=True if self.flash_attention else False if self.no_flash_attention else None,
                store=store,
                state=cast(StateMode, state),  # here too
            )


@dataclass(frozen=True)
class StoreOptions:
    """Where looks and states are kept, if anywhere."""

    store: StoreFolder = None
    no_store: Annotated[
        bool,
        typer.Option("--no-store", help="Neither read nor keep looks and states in a store.", rich_help_panel=_STORE),
    ] = False

    @property
    def choice(self) -> "Path | bool":
        """The folder, True for the user's own, or False for none, as `lookonce.load` takes it. Raises InputError."""
        if self.no_store and self.store is not None:
            raise InputError("--store and --no-store were both given: give one of them")
        return not self.no_store if self.store is None else self.store


@dataclass(frozen=True)
class PixelOptions:
    """The size that pictures are brought to."""

    min_pixels: Annotated[
        int | None, typer.Option(metavar="N", help="Enlarge a picture of fewer pixels. Default: the model's.")
    ] = None
    max_pixels: Annotated[
        int | None, typer.Option(metavar="N", help="Shrink a picture of more pixels. Default: the model's.")
    ] = None


@dataclass(frozen=True)
class SampleOptions:
    """How a reply is generated."""

    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Default: 1024.", rich_help_panel=_REPLY)] = None
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="0 takes the likeliest token each time. Default: 0.7.", rich_help_panel=_REPLY),
    ] = None
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Default: 0.8.", rich_help_panel=_REPLY)] = None
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Default: 20.", rich_help_panel=_REPLY)] = None
    min_p: Annotated[float | None, typer.Option(metavar="P", help="Default: 0.", rich_help_panel=_REPLY)] = None
    repeat_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Default: 1, which is off.", rich_help_panel=_REPLY)
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes a reply repeatable.", rich_help_panel=_REPLY)] = (
        None
    )
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the reply; may be repeated.", rich_help_panel=_REPLY),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A GBNF grammar that the reply follows.", rich_help_panel=_REPLY),
    ] = None
    json_schema: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="A JSON schema that the reply satisfies.", rich_help_panel=_REPLY),
    ] = None

    def options(self) -> "SamplingOptions":
        """Those that were given, for `Model.ask`; checked before any model is loaded. Raises InputError."""
        from lookonce.sampling import Sampling

        given: dict[str, Any] = {
            field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None
        }
        if self.grammar is not None:
            given["grammar"] = _read_text(self.grammar, "--grammar")
        if self.json_schema is not None and not self.json_schema.lstrip().startswith("{"):
            given["json_schema"] = _read_text(Path(self.json_schema), "--json-schema")
        _ = Sampling(**given).schema_text
        return cast("SamplingOptions", given)


@dataclass(frozen=True)
class VectorOptions:
    """What becomes a vector, and how."""

    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="last, mean, cls (the first) or max. Default: the card's, else last.",
            rich_help_panel=_VECTOR,
        ),
    ] = None
    layer: Annotated[
        int,
        typer.Option(metavar="N", help="Whose output is pooled: -1 is the last.", rich_help_panel=_VECTOR),
    ] = -1
    tokens: Annotated[
        str, typer.Option(metavar="KIND", help="What is pooled: all, text or image.", rich_help_panel=_VECTOR)
    ] = "all"
    dimension: Annotated[
        int | None,
        typer.Option(metavar="D", help="Keep the first D values. Default: the model's width.", rich_help_panel=_VECTOR),
    ] = None
    instruction: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The task. Default: Represent the user's input.", rich_help_panel=_VECTOR),
    ] = None
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="chat: Qwen3-VL-Embedding's; plain: the input alone. Default: the card's, else chat.",
            rich_help_panel=_VECTOR,
        ),
    ] = None
    no_normalize: Annotated[
        bool, typer.Option("--no-normalize", help="Do not divide by the L2 norm.", rich_help_panel=_VECTOR)
    ] = False
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate", help="Cut a text that does not fit the context; else it is bad.", rich_help_panel=_VECTOR
        ),
    ] = False
    pca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A PCA that Embedder.save_pca wrote.", rich_help_panel=_VECTOR),
    ] = None

    def embedder(self, model: "Model", pixels: PixelOptions) -> "Embedder":
        """The embedder that these options describe. Raises InputError for one that the model cannot serve."""
        from lookonce.embedder import Embedder

        return Embedder(
            model,
            # The embedder refuses others with the list of them, here and below.
            pooling=cast("Pooling | None", self.pooling),
            layer=self.layer,
            tokens=cast("PooledTokens", self.tokens),
            normalize=not self.no_normalize,
            dimension=self.dimension,
            instruction=self.instruction,
            prompt=cast("PromptStyle | None", self.prompt),
            min_pixels=pixels.min_pixels,
            max_pixels=pixels.max_pixels,
            truncate=self.truncate,
            pca=self.pca,
        )


def _read_text(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{option} {str(path)!r} cannot be read: {reason}") from error


def open_store(folder: Path | None) -> "Store":
    """The store that `--store` names, or the user's own."""
    from lookonce.store import Store

    return Store(folder)
