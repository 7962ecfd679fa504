"""Fetch a model's two files from Hugging Face or ModelScope, verified, as `lookonce pull` does.

python scripts/download_model.py qwen3-vl-2b-instruct --to models
"""

import argparse
import sys

from lookonce.cli_pull import fetch
from script_options import make_bare_parser, run_script


def download(options: argparse.Namespace) -> None:
    """Pull the files of the model that the options name."""
    fetch(
        options.name,
        quant=options.quant,
        projector_type=options.mmproj_type,
        source=options.source,
        folder=options.to,
        as_json=options.json,
    )


def main(arguments: list[str]) -> int:
    """Run the script and give its exit status."""
    parser = make_bare_parser("download_model", "Fetch a model's two files, verified by size and SHA-256.")
    parser.add_argument("name", help="a card's name, as qwen3-vl-2b-instruct, or NAME:QUANT")
    parser.add_argument("--quant", metavar="TYPE", help="quantization of the text model (default: the card's first)")
    parser.add_argument("--mmproj-type", metavar="TYPE", help="type of the projector file (default: the card's first)")
    parser.add_argument("--source", default="auto", metavar="HUB", help="auto, huggingface or modelscope")
    parser.add_argument("--to", metavar="FOLDER", help="where the files go (default: the hub's cache)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return run_script(parser, arguments, download)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
