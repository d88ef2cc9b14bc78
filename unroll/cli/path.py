"""The folder in which a command runs, as a place of modules."""

from __future__ import annotations

import os
import sys


def import_from_here() -> None:
    """Let modules of the current folder be imported, if they are found nowhere else.

    For commands that are given a factory, whose code is to be run, alone: what else lies beside a file to be read is
    not asked for, whatever its name.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
