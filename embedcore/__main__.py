"""``python -m embedcore``: the command line."""

import sys

from embedcore.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
