"""What the scripts around a model share: their model options, and errors in one line as the command line gives them."""

import argparse
import os
from collections.abc import Callable
from typing import NoReturn

import lookonce
from lookonce.cli_option import ModelOptions
from lookonce.terminal import Terminal

__all__ = ["Parser", "load_model", "make_bare_parser", "make_parser", "run_script"]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, to be told in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise lookonce.InputError(f"{message}: --help shows what there is")


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Give a parser that knows --model, --mmproj, --device and --verbose."""
    parser = make_bare_parser(program, description)
    parser.add_argument(
        "--model", help="a card's name, the text model's .gguf file, or its folder (default: $LOOKONCE_MODEL)"
    )
    parser.add_argument(
        "--mmproj", help="its projector file (default: the card's, or the one beside the model that fits)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 or metal")
    return parser


def make_bare_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Give a parser that knows --verbose."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--verbose", action="store_true", help="show the log and tracebacks on stderr")
    return parser


def load_model(options: argparse.Namespace) -> lookonce.Model:
    """Load the model that the options name, or the environment."""
    model = options.model or os.environ.get("LOOKONCE_MODEL")
    mmproj = options.mmproj or os.environ.get("LOOKONCE_MMPROJ")
    return ModelOptions(model=model, mmproj=mmproj, device=options.device).load(store=True)


def run_script(
    parser: argparse.ArgumentParser, arguments: list[str], work: Callable[[argparse.Namespace], None]
) -> int:
    """Parse the arguments, do the work, and give the exit status: 2 for bad input, 1 for other failures."""
    terminal = Terminal(parser.prog)

    def parse_and_work() -> None:
        options = parser.parse_args(arguments)
        if options.verbose:
            terminal.be_verbose()
        work(options)

    return terminal.run(parse_and_work)
