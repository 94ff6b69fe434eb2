"""Which GPUs a job asks for, on this machine or of a cluster's scheduler.

Pure functions of the site's settings and of what the job needs; a job never gets fewer GPUs than it
needs: it is refused.
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
    """What a scheduler is asked for, as Snakemake's resources of the same names; None: unsaid.

    gpu: GPUs of all nodes. gpu_model: kind of GPU. gres: GPUs of one node, of a kind where one is
    named, for sites that want `--gres` instead.
    """

    gpu: int | None = None
    gpu_model: str | None = None
    gres: str | None = None


def local_devices(site: Site) -> Devices:
    """The GPUs of this machine that jobs may use."""
    if site.gpus == "none":
        return Devices((), "site.gpus = none")
    return gpu_locks.devices()


def has_gpus(site: Site) -> bool:
    """Whether jobs that can use GPUs find some."""
    return site.gpus == "scheduler" or bool(local_devices(site).names)


def require_gpus(site: Site, count: int) -> None:
    """Raises MptTrtError when this machine, if jobs run on it, has less than `count` GPUs."""
    if site.gpus != "scheduler":
        gpu_locks.require(count, local_devices(site))


def most_gpus(site: Site) -> int:
    """GPUs of this machine or, if jobs run elsewhere, of a node of the cluster."""
    return site.gpus_per_node if site.gpus == "scheduler" else len(local_devices(site).names)


def num_nodes(site: Site, num_ranks: int) -> int:
    """The fewest nodes that the ranks divide evenly among, a GPU a rank.

    One for this machine, and for a cluster's processors.
    """
    if site.gpus != "scheduler":
        return 1
    fewest = -(-num_ranks // site.gpus_per_node)
    return next(nodes for nodes in range(fewest, num_ranks + 1) if num_ranks % nodes == 0)


def gpu_request(site: Site, count: int, memory: int) -> GpuRequest:
    """For `count` GPUs, of which each must have `memory` bytes.

    Raises MptTrtError when the cluster has none so large.
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
            f"a rank needs {memory / GB:.1f} GB of its GPU, and the largest of site.gpu_memory_gb "
            f"is {name} with {size:g} GB; ask for more ranks"
        )
    return fitting[min(fitting)]
