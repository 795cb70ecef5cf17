"""What the tests of the provider share."""

from __future__ import annotations

import sys
from pathlib import Path

# For the fake of the service.
if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))
