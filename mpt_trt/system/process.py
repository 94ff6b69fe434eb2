"""The environment of the workflow's jobs and of tools."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Of C's allocator: ask for huge pages, and cut blocks of up to 32 MiB from one range. By default
# they may get ranges of their own, whose ends lie in ordinary pages: half of a matrix of 4 MiB, an
# eighth of one of 16.
TUNABLES = {"glibc.malloc.hugetlb": 1, "glibc.malloc.mmap_threshold": 32 << 20}
# From Linux's sys/prctl.h.
PR_SET_PDEATHSIG = 1


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


def restart_with_huge_pages(offer: Path = HUGE_PAGES) -> None:
    """Starts this program anew with large blocks of memory in huge pages, where one has to ask.

    Weights that ONNX Runtime holds are then loaded and read faster (see docs/performance.md). C's
    allocator asks for such pages when GLIBC_TUNABLES says so at a program's start, and at no other
    time; C libraries other than glibc ignore that. Returns where the system gives huge pages to all
    or to none, where GLIBC_TUNABLES says something about them already, and where only --help is
    asked for.

    offer: the system's setting.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "")
    if {"-h", "--help"}.intersection(sys.argv):
        return
    if "hugetlb" in asked or not offer.exists() or "[madvise]" not in offer.read_text():
        return
    ours = [f"{name}={value}" for name, value in TUNABLES.items() if name not in asked]
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [asked, *ours]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def end_with_parent() -> None:
    """Makes Linux end this process when its parent has ended, in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
