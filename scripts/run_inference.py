"""Ask a saved look one prompt or several, with no projector file.

    python scripts/run_inference.py --embeddings cat.safetensors --model model.gguf \\
        --prompt "What colour is it?" --prompt "Is it awake?"

Each prompt is put on a new line after the text that was saved with the look.
"""

import argparse
import sys

from lookonce import ImageEmbedding
from lookonce.cli_option import SampleOptions
from lookonce.terminal import write
from script_options import load_model, make_parser, run_script


def infer(options: argparse.Namespace) -> None:
    """Ask each prompt by itself, and print each answer."""
    look = ImageEmbedding.load(options.embeddings)
    sampling = SampleOptions(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)
    chosen = sampling.options()
    with load_model(options) as model:
        for number, prompt in enumerate(options.prompt):
            question = f"{look.text}\n{prompt}" if look.text else prompt
            if len(options.prompt) > 1:
                write(f"{'' if number == 0 else chr(10)}> {prompt}\n")
            with model.ask(question, images=[look], stream=True, **chosen) as stream:
                for piece in stream:
                    write(piece)
            write("\n")


def main(arguments: list[str]) -> int:
    """Run the script and give its exit status."""
    parser = make_parser("run_inference", "Ask a saved look one prompt or several, with no projector file.")
    parser.add_argument("--embeddings", required=True, metavar="FILE", help="a look saved by save_embeddings.py")
    parser.add_argument("--prompt", required=True, action="append", help="may be repeated; each is asked by itself")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: 1024")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token; default: 0.7")
    parser.add_argument("--seed", type=int, metavar="N", help="makes a reply repeatable")
    return run_script(parser, arguments, infer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
