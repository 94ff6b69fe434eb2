"""The environment of the workflow's jobs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prefer_this_python() -> None:
    """Makes jobs run the Python that runs now, although its environment is not activated.

    A conda environment or a container of a rule comes before it.
    """
    own = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])
