"""Measurements: this project's decode against the machine's ceilings and against the peers that are installed."""

import sys
from pathlib import Path

# Cases and comparator are the tests' own modules, imported as the tests import them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
