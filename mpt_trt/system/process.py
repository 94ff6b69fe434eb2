"""The environment of the workflow's jobs and of tools."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Settings of C's allocator: ask for huge pages, and allocate blocks of up to 32 MiB from one range.
# By default, large blocks may get separate ranges whose ends have ordinary pages: half of a 4 MiB
# matrix, an eighth of a 16 MiB matrix.
TUNABLES = {"glibc.malloc.hugetlb": 1, "glibc.malloc.mmap_threshold": 32 << 20}
# From Linux's sys/prctl.h.
PR_SET_PDEATHSIG = 1


def prefer_this_python() -> None:
    """Makes jobs use the running Python, even if its environment is not activated.

    A conda environment or a container of a rule has precedence.
    """
    own = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])


def wait_without_spinning() -> None:
    """Lets PyTorch's and NumPy's threads sleep while they wait; keeps variables that are set.

    By default, they spin on cores that other work needs (docs/appendix/experiments.md). Must run
    before PyTorch and NumPy are imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # OpenBLAS: 2**4 cycles, the minimum. Its threads spin as soon as NumPy is imported.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def restart_with_huge_pages(offer: Path = HUGE_PAGES) -> None:
    """Restarts this program with huge pages, if the system offers them only on request.

    ONNX Runtime then loads and reads its weights faster (docs/appendix/experiments.md). C's
    allocator reads GLIBC_TUNABLES only when a program starts; C libraries other than glibc ignore
    it. Returns without a restart if the system gives huge pages to all programs or to none, if
    GLIBC_TUNABLES already mentions them, and for --help.

    offer: file with the system's setting.
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
    """Makes Linux kill this process when its parent ends, whatever ended it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
