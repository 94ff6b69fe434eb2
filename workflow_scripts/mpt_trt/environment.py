"""The environment of the workflow's jobs and of tools."""

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


def wait_without_spinning() -> None:
    """PyTorch's and NumPy's threads sleep while they wait, unless told otherwise outside.

    By default they spin, on cores that other work needs: beside one busy process, calibration of
    the demo model on two cores took thrice as long or more. It counts until they are imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # OpenBLAS: 2**4 cycles, the fewest. Its threads spin from NumPy's import on.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
