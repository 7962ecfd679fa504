"""Lets `python -m lookonce` do what `lookonce` does."""

import sys

from lookonce.cli import main

sys.exit(main())
