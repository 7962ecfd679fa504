"""Look at a picture and save what was seen, with a text, in one file for `run_inference.py`.

    python scripts/save_embeddings.py --image cat.jpg --text "A photo from my garden." --output cat.safetensors \\
        --model model.gguf
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from lookonce.look_plan import check_picture, check_target
from lookonce.terminal import status, write
from script_options import load_model, make_parser, run_script


def save(options: argparse.Namespace) -> None:
    """Look at the picture and save the look."""
    target = Path(options.output).expanduser()
    check_target(target)
    check_picture(options.image)
    with load_model(options) as model:
        with status(f"Looking at {options.image}"):
            look = model.look(options.image)
        dataclasses.replace(look, text=options.text).save(target)
    write(f"{target}: {look.n_rows} rows of {look.width}, source {look.source}\n")


def main(arguments: list[str]) -> int:
    """Run the script and give its exit status."""
    parser = make_parser("save_embeddings", "Look at a picture and save what was seen, with a text.")
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture")
    parser.add_argument("--text", default="", help="what every later prompt starts with")
    parser.add_argument("--output", required=True, metavar="FILE", help=".safetensors, or .pt with torch")
    return run_script(parser, arguments, save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
