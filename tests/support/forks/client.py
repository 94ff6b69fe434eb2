"""Stands in for Python: has the command line run by a fork, or starts Python if that would differ.

client.py PYTHON FOLDER ARGUMENTS...

PYTHON: the real one. FOLDER: has the sockets of the servers. Imports little, because it is started
for each run.
"""

import os
import socket
import sys

# Variables that packages or Python read on import: a fork would miss a change.
READ_ON_IMPORT = (
    "HF_", "TRANSFORMERS_", "PYTHON", "LD_", "LC_", "LANG", "HOME", "XDG_", "MPL", "TZ",
)  # fmt: skip
# A variable of ranks of mpirun, and one that mpirun sets for its own use.
MPI_RANK, MPI_LIBRARIES = "OMPI_COMM_WORLD_RANK", "LD_LIBRARY_PATH"
# A variable of ranks of mpirun, and of those of srun, which knows them by their process.
PMIX_RANK = "PMIX_RANK"
SNAKEMAKE, LIGHT, TORCH, HUB = "snakemake", "light", "torch", "hub"
# Variables that the packages of a server do not read: its runs import those that do.
UNREAD = {HUB: ("HF_", "TRANSFORMERS_")}
WITH_TORCH = (
    "smoke_test.py", "compute_reference.py", "compare_trtllm.py", "quantize.py",
    "measure_quality.py", "simulated_driver.py", "cuda_ranks_driver.py",
)  # fmt: skip
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP")


def server_of(arguments: list) -> str | None:
    """Name of the server that has the packages of a command line; None for the real Python."""
    if arguments[:2] == ["-m", "snakemake"]:
        return SNAKEMAKE
    if not arguments or not arguments[0].endswith(".py"):
        return None
    if os.path.basename(arguments[0]) == "fetch_checkpoint.py":  # noqa: PTH119
        return HUB
    needs_torch = os.path.basename(arguments[0]) in WITH_TORCH  # noqa: PTH119
    return TORCH if needs_torch or is_calibrated(arguments) else LIGHT


def is_calibrated(arguments: list) -> bool:
    """Returns whether a tool calibrates, with ModelOpt."""
    is_smoothquant = any(each.startswith(("-sq", "--smoothquant")) for each in arguments)
    return is_smoothquant or os.path.basename(arguments[0]) == "quantize.py"  # noqa: PTH119


def fixed_variables(environment: dict, server: str) -> dict:
    """The variables that a run must share with the server of this name."""
    ignored = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE"}
    if MPI_RANK in environment:
        ignored.add(MPI_LIBRARIES)
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_ON_IMPORT)
        and name not in ignored
        and not name.startswith(UNREAD.get(server, ()))
    }


def process_state() -> dict:
    """What a process inherits from its parent, and a run must share with the server."""
    import resource

    # Linux ignores RLIMIT_RSS, which SLURM sets.
    limits = {name for name in dir(resource) if name.startswith("RLIMIT_")} - {"RLIMIT_RSS"}
    mask = os.umask(0)
    os.umask(mask)
    return {
        "limits": {name: list(resource.getrlimit(getattr(resource, name))) for name in limits},
        "umask": mask,
        "user": [*os.getresuid(), *os.getresgid()],
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "signals": blocked_and_ignored(),
    }


def blocked_and_ignored() -> list:
    """Masks of the signals that this process blocks and ignores."""
    with open("/proc/self/status") as stream:  # noqa: PTH123
        return [line for line in stream if line.startswith(("SigBlk:", "SigIgn:"))]


def run_forked(path: str, arguments: list) -> int | None:
    """Exit status of a run, negative for a signal; None if the server rejects it."""
    # Not needed, and a fifth of the start, if the real Python runs.
    import array
    import json
    import signal

    folder = os.getcwd()  # noqa: PTH109
    request = {
        "arguments": arguments,
        "folder": folder,
        "environment": dict(os.environ),
        "cores": sorted(os.sched_getaffinity(0)),
        "state": process_state(),
    }
    content = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        streams = array.array("i", [0, 1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        connection.sendmsg([len(content).to_bytes(8, "big")], rights)
        connection.sendall(content)
        answers = connection.makefile("r")
        if not (line := answers.readline()):
            return None
        pid = int(line)
        for name in FORWARDED:
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda received, _: os.kill(pid, received))
        return int(answers.readline() or 1)


def main() -> None:
    python, folder, *arguments = sys.argv[1:]
    server = server_of(arguments)
    status = None
    is_rank_of_srun = PMIX_RANK in os.environ and MPI_RANK not in os.environ
    if server is not None and not is_rank_of_srun:
        try:
            for stream in range(3):
                os.fstat(stream)
            status = run_forked(os.path.join(folder, server), arguments)  # noqa: PTH118
        except OSError:
            status = None
    if status is None:
        os.execv(python, [python, *arguments])
    if status < 0:
        import signal  # as above

        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
