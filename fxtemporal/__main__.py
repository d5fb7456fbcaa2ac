"""``python -m fxtemporal``: the command line."""

import sys

from fxtemporal.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
