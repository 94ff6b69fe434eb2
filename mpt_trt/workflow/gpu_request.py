"""GPUs that a job requests, on this machine or from a cluster's scheduler.

Pure functions of the site's settings and the job's needs. A job that needs more GPUs than there are
is rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.engines.memory import GB
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpu_locks
from mpt_trt.system.gpu_locks import Devices
from mpt_trt.workflow.settings import Site


@dataclass(frozen=True)
class GpuRequest:
    """Request to a scheduler, as Snakemake's resources of the same names; None: not requested.

    gpu: GPUs on all nodes. gpu_model: kind of GPU. gres: GPUs on one node, with their kind if it is
    named, for sites that use `--gres`.
    """

    gpu: int | None = None
    gpu_model: str | None = None
    gres: str | None = None


def never_requested(site: Site) -> frozenset[str]:
    """Fields of GpuRequest that no job on this site has."""
    return frozenset() if site.gpus == "scheduler" else frozenset({"gpu_model", "gres"})


def local_devices(site: Site) -> Devices:
    """GPUs of this machine that jobs may use."""
    if site.gpus == "none":
        return Devices((), "site.gpus = none")
    return gpu_locks.devices()


def has_gpus(site: Site) -> bool:
    """Returns whether there are GPUs for jobs."""
    return site.gpus == "scheduler" or bool(local_devices(site).names)


def require_gpus(site: Site, count: int) -> None:
    """Raises MptTrtError when jobs run on this machine and it has fewer than `count` GPUs."""
    if site.gpus != "scheduler":
        gpu_locks.require(count, local_devices(site))


def num_nodes(site: Site, num_ranks: int) -> int:
    """Smallest number of nodes that divides the ranks evenly, with one GPU per rank.

    It is 1 for this machine, and for a cluster without GPUs.
    """
    if site.gpus != "scheduler":
        return 1
    fewest = -(-num_ranks // site.gpus_per_node)
    return next(nodes for nodes in range(fewest, num_ranks + 1) if num_ranks % nodes == 0)


def gpu_request(site: Site, count: int, memory: int) -> GpuRequest:
    """Makes a request for `count` GPUs with at least `memory` bytes each.

    Raises MptTrtError when the cluster has no GPU of that size.
    """
    if count == 0:
        return GpuRequest()
    if site.gpus != "scheduler":
        return GpuRequest(gpu=count)
    model = _smallest_model(site, memory)
    if site.gpu_request == "gpus":
        return GpuRequest(gpu=count, gpu_model=model)
    kind = "gpu" if model is None else f"gpu:{model}"
    return GpuRequest(gres=f"{kind}:{count // num_nodes(site, count)}")


def _smallest_model(site: Site, memory: int) -> str | None:
    if not site.gpu_memory_gb:
        return None
    fitting = {size: name for name, size in site.gpu_memory_gb.items() if size * GB >= memory}
    if not fitting:
        name, size = max(site.gpu_memory_gb.items(), key=lambda item: item[1])
        raise MptTrtError(
            f"a rank needs {memory / GB:.1f} GB on its GPU, but the largest GPU of "
            f"site.gpu_memory_gb is {name} with {size:g} GB; use more ranks"
        )
    return fitting[min(fitting)]
