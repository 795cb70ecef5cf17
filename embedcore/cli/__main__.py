"""``python -m embedcore.cli``, where the script is not on the path."""

import sys

from embedcore.cli.app import main

sys.exit(main())
