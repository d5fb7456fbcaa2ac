"""``python -m fxtemporal``: the command line."""

import sys

from fxtemporal.cli import main

if __name__ == "__main__":
    sys.exit(main())
