"""Write a text GGUF and a projector GGUF with seeded random weights, for tests and benchmarks.

The files are what llama.cpp's converter and quantizer would write for a model of that shape, so that speed,
memory and fidelity can be measured without a download. The same arguments give the same bytes.

    python scripts/make_model.py models --family qwen3vl --shape 2b --type Q4_K_M --mmproj-type F16
"""

import argparse
import sys
from pathlib import Path

from lookonce.errors import NativeError
from lookonce.gguf_type import FILE_TYPES
from lookonce.synthetic.pair import TEXT_TYPES, make_pair
from lookonce.synthetic.shape import FAMILIES, shape_names


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("outdir", type=Path, help="folder for the two files; made if missing")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3vl")
    shapes = "; ".join(f"{family}: {', '.join(shape_names(family))}" for family in FAMILIES)
    parser.add_argument("--shape", default="tiny", help=shapes)
    parser.add_argument("--type", choices=TEXT_TYPES, default="F32", help="type of the text model")
    parser.add_argument("--mmproj-type", choices=list(FILE_TYPES), default="F32", help="type of the projector")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command line; the two paths go to stdout."""
    options = _parse(arguments)
    try:
        paths = make_pair(
            options.outdir,
            family=options.family,
            shape=options.shape,
            type=options.type,
            mmproj_type=options.mmproj_type,
            seed=options.seed,
        )
    except (ValueError, OSError, NativeError) as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
