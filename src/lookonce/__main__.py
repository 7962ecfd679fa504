"""Where the command `lookonce` and `python -m lookonce` begin."""

import os
import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is being imported ends it as quietly as later."""
    try:
        from lookonce.cli import main as run
    except KeyboardInterrupt:
        os.write(2, b"lookonce: interrupted\n")
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
