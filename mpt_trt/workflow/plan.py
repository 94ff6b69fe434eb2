"""Plans a run: the inputs of jobs.

All results are functions of the checked settings, a job's wildcards and the model's files, if they
are on disk. Errors are MptTrtErrors before any job runs. `proof_inputs` has the inputs of proofs,
`job_checks` the checks of jobs, `job_options` the options of their commands, and `job_resources`
their resources.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpt_trt.calibration.defaults import FILE_NAME
from mpt_trt.checkpoint import known_models
from mpt_trt.checkpoint.adapter import adapter_files
from mpt_trt.checkpoint.files import checkpoint_files
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.source import is_hub_id
from mpt_trt.engines.spec import TENSORRT_LLM, EngineSpec
from mpt_trt.engines.tensorrt.packages import Package, choose_package
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.llama_cpp_result import fits_llama_cpp, is_llama_cpp_installed
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.proofs.facts import (
    existing_files,
)
from mpt_trt.system.code_version import source_hash
from mpt_trt.system.shown_paths import seen_from
from mpt_trt.workflow import gpu_request, key_checks, target_names
from mpt_trt.workflow.settings import Settings, Variant
from mpt_trt.workflow.target_names import CalibrationName
from mpt_trt.workflow.trtllm_sources import trtllm_calibration, trtllm_ft_storage

DEFAULT_SHAPE = "mpt-7b"
"""Shape that is assumed for a hub model until its config.json is fetched."""


@dataclass(frozen=True)
class Target:
    """A job's wildcards; those that its rule lacks keep their defaults."""

    model: str = ""
    variant: str = ""
    tp: int = 1
    rank: int = 0
    storage: str = ""
    qformat: str = ""

    @classmethod
    def of(cls, wildcards: Mapping[str, str]) -> Target:
        fields: dict[str, Any] = dict(wildcards)
        for name in ("tp", "rank"):
            if name in fields:
                fields[name] = int(fields[name])
        return cls(**fields)


# A name in braces; other braces are left alone.
WILDCARD = re.compile(r"\{\s*\w+\s*(?:,[^{}]*)?\}")


@dataclass(frozen=True, eq=False)
class Plan:
    """Plan of a run.

    repository: folder of the Snakefile. working_directory: folder of artifacts. deploys_software:
    whether jobs run in conda environments or containers instead of the planning environment.
    """

    settings: Settings
    repository: Path
    working_directory: Path = Path()
    deploys_software: bool = False

    @cached_property
    def has_gpus(self) -> bool:
        """Returns whether there are GPUs for jobs."""
        return gpu_request.has_gpus(self.settings.site)

    # --- checkpoints ------------------------------------------------------------------------------

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {name: self.find(model.source) for name, model in self.settings.models.items()}

    @cached_property
    def _hub_ids(self) -> frozenset[str]:
        """Sources that are hub ids; found once, because many jobs need them."""
        return frozenset(filter(is_hub_id, self._sources.values()))

    def source(self, target: Target) -> str:
        """Hub id or folder of the model."""
        source = self.settings.model(target.model).source
        if match := re.match(r"https?://[^/]+/(?P<id>[^/]+/[^/]+)", source):
            raise MptTrtError(
                f"models.{target.model}.source = {source}: expected a hub id or a folder; write "
                f"{match['id']}"
            )
        return self._sources[target.model]

    def shipped(self, path: str) -> Path:
        """Path of a file of the repository, relative to the working directory."""
        return self._repository / path

    @cached_property
    def _repository(self) -> Path:
        is_here = self.working_directory.resolve() == self.repository.resolve()
        return Path() if is_here else self.repository

    def find(self, path: str) -> str:
        """Resolves a path of the configuration, relative to the working directory.

        `~` is the user's home. A relative path that exists only in the repository, such as
        `resources/mpt-demo`, refers to the repository.

        Raises MptTrtError for a path that Snakemake cannot have as an input, however it is quoted.
        """
        if match := WILDCARD.search(path):
            raise MptTrtError(
                f"{path}: Snakemake takes {match[0]} in a path for a wildcard; rename it, or give "
                "the path of a link to it (ln -s)"
            )
        path = os.path.expanduser(path)  # noqa: PTH111 (that fails if there is no such user)
        shipped = self.repository / path
        # Path.exists fails in folders without permission, and other models may be there.
        is_here = os.path.exists(self.working_directory / path)  # noqa: PTH110
        return str(shipped) if not is_here and os.path.exists(shipped) else path  # noqa: PTH110

    def script(self, name: str) -> Path:
        """Path of a script of workflow_scripts/."""
        return self.shipped(f"workflow_scripts/{name}")

    def code_version(self, name: str) -> str:
        """Hash of a script's code, so that an edit repeats its jobs."""
        return source_hash((self.repository / "workflow_scripts" / name).resolve())

    def revision(self, target: Target) -> str:
        """Branch, tag or commit of the model on the hub."""
        return self.settings.model(target.model).revision

    def is_on_hub(self, target: Target) -> bool:
        return self.source(target) in self._hub_ids

    def checkpoint_folder(self, target: Target) -> str:
        """Folder of the model in Hugging Face format: its source, or that of its hub files."""
        # Without a leading ./, which Snakemake warns of.
        source = self.source(target)
        return f"checkpoints/{target.model}" if self.is_on_hub(target) else str(Path(source))

    def checkpoint_inputs(self, target: Target) -> list[str]:
        """Lists the folder, then each file of the user's own that is read."""
        folder = self.checkpoint_folder(target)
        if self.is_on_hub(target):
            return [folder, *self._adapter_inputs(target)]
        path = self.working_directory / folder
        if not path.is_dir():
            raise MptTrtError(
                f"no such folder: {path}; models.{target.model}.source must be a hub id "
                "(owner/name) or a folder"
            )
        files = checkpoint_files(path)
        own = [str(Path(folder, path.name)) for path in files]
        return [folder, *own, *self._adapter_inputs(target)]

    def adapter_folder(self, target: Target) -> str | None:
        """Folder of the LoRA adapter that is merged into the model, if any.

        Raises MptTrtError when it does not exist.
        """
        adapter = self.settings.model(target.model).adapter
        if adapter is None:
            return None
        folder = self.find(adapter)
        if not (self.working_directory / folder).is_dir():
            raise MptTrtError(
                f"models.{target.model}.adapter = {adapter}: no such folder; give one that PEFT's "
                "save_pretrained has written"
            )
        return folder

    def _adapter_inputs(self, target: Target) -> list[str]:
        folder = self.adapter_folder(target)
        if folder is None:
            return []
        files = adapter_files(self.working_directory / folder)
        return [str(Path(folder, path.name)) for path in files]

    def tokenizer_folder(self, target: Target) -> str:
        tokenizer = self.settings.model(target.model).tokenizer
        return self.checkpoint_folder(target) if tokenizer is None else self.find(tokenizer)

    def calibration_text(self, target: Target) -> list[str]:
        """The user's calibration text; [] for the one that ships."""
        text = self.settings.calibration.text
        return [] if text is None else [str(Path(self.find(text)))]

    def quality_text(self, target: Target) -> str:
        return str(Path(self.find(self.settings.quality.text)))

    def require_text(self, key: str, text: str) -> None:
        """Raises MptTrtError when `text`, the value of `key`, does not name a file."""
        key_checks.require_file(key, text, self.working_directory / self.find(text))

    def task_files(self, target: Target) -> list[str]:
        """Files of `quality.task_dir`, so that edits repeat measurements; [] without tasks.

        Raises MptTrtError when it is not a folder, or the workflow's outputs are in it.
        """
        return self._task_files

    @cached_property
    def _task_files(self) -> list[str]:
        quality = self.settings.quality
        if quality.task_dir is None or not quality.tasks:
            return []
        folder = self.working_directory / self.find(quality.task_dir)
        if not folder.is_dir():
            raise MptTrtError(f"quality.task_dir = {quality.task_dir}: no such folder")
        return self.inputs_in(folder, f"quality.task_dir = {quality.task_dir}: the folder")

    def inputs_in(self, path: Path, label: str) -> list[str]:
        """Paths of a file, or of a folder's files. label: what names it, for error messages."""
        here = self.working_directory.resolve()
        if os.path.isdir(path) and here.is_relative_to(path.resolve()):  # noqa: PTH112
            raise MptTrtError(
                f"{label} contains the workflow's outputs; move the task files to a folder of "
                "their own"
            )
        return [self.find(seen_from(self.working_directory, file)) for file in existing_files(path)]

    def size_of_whole_text(self, target: Target) -> int:
        """Bytes of the text that is measured as a whole; 0 if none is, or if it is missing."""
        path = self.working_directory / self.quality_text(target)
        return path.stat().st_size if self.settings.quality.whole_text and path.is_file() else 0

    def storage_type(self, target: Target) -> str:
        """Type of the FT checkpoint's files, with the converter's name."""
        return target_names.ft_storage(target.storage).storage_type

    def stored_config(self, target: Target) -> MptConfig | None:
        """Architecture of the model; None until its config.json is on disk."""
        # Many jobs ask, so without pathlib, which takes four times as long.
        folder = os.path.join(self.working_directory, self.checkpoint_folder(target))  # noqa: PTH118
        try:
            return _config_at(folder, os.stat(f"{folder}/config.json").st_mtime_ns)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return None

    def planned_config(self, target: Target) -> MptConfig:
        """Architecture that resources are computed from: the expected one, or a usual one."""
        return self.expected_config(target) or known_models.known_config(DEFAULT_SHAPE)

    def expected_config(self, target: Target) -> MptConfig | None:
        """Architecture of the model or, until it is fetched, of the known model of its name.

        None for a model that is neither fetched nor known.
        """
        if (config := self.stored_config(target)) is not None:
            return config
        name = Path(self.source(target)).name
        return known_models.known_config(name) if name in known_models.SHIPPED else None

    # --- engines ----------------------------------------------------------------------------------

    def variant(self, target: Target) -> Variant:
        return self.settings.variant(target.variant)

    def engine_spec(self, target: Target) -> EngineSpec:
        """Spec that a job's resources are computed from.

        A tensor-parallel size that does not divide the planned architecture may be valid for the
        fetched model. Until then, a single rank's resources are used, which are an upper bound.
        """
        config = self.planned_config(target)
        tp_size = target.tp if sharding.is_legal(config, target.tp) else 1
        return _spec_of(config, self.variant(target), tp_size)

    def builder(self, target: Target) -> Package:
        """Package that builds the plan, with `backend: auto` resolved."""
        return choose_package(self.variant(target).backend, self.has_gpus)

    def ft_checkpoint(self, target: Target) -> str:
        """FT checkpoint that the variant's networks are made from."""
        variant = self.variant(target)
        name = target_names.ft_storage_of(variant.dtype, variant.quantization).name
        return f"ft_ckpts/{target.model}/{name}/{target.tp}-gpu"

    def calibration(self, target: Target) -> list[str]:
        """Calibration result that the variant's networks are made from, if any."""
        variant = self.variant(target)
        name = target_names.calibration_of(variant.quantization, variant.kv_cache_dtype)
        return _calibration_result(target.model, name)

    def plans_of_ranks(self, target: Target) -> list[str]:
        folder = f"build/plans/{target.model}/{target.variant}/{target.tp}-gpu"
        return [f"{folder}/rank{rank}.engine" for rank in range(target.tp)]

    def ft_checkpoint_for_trtllm(self, target: Target) -> str:
        variant = self.variant(target)
        name = trtllm_ft_storage(variant.dtype, variant.quantization).name
        return f"ft_ckpts/{target.model}/{name}/{target.tp}-gpu"

    def calibration_for_trtllm(self, target: Target) -> list[str]:
        variant = self.variant(target)
        return _calibration_result(target.model, trtllm_calibration(variant.quantized))

    def variants_of_trtllm(self) -> str:
        """Wildcard constraint for variants whose engines TensorRT-LLM builds."""
        names = self.settings.variants_of(TENSORRT_LLM)
        return "|".join(map(re.escape, names)) or "(?!)"

    def other_variants(self) -> str:
        """Wildcard constraint for any other name, including unknown ones."""
        return f"(?!(?:{self.variants_of_trtllm()})/)[^/]+"

    # --- reports ----------------------------------------------------------------------------------

    @cached_property
    def engines_of_report(self) -> list[tuple[str, int]]:
        """(variant, tp_size) of every engine in a model's report."""
        return self.settings.engines_of_report()

    def variants_of_report(self, target: Target) -> list[str]:
        return [variant for variant, _ in self.engines_of_report]

    def quality_of_report(self, target: Target) -> list[str]:
        return self._results_of_report("quality", target)

    def smoke_tests_of_report(self, target: Target) -> list[str]:
        """Results of engines that passed, and of those that failed."""
        return self._results_of_report("build/smoke_tests", target)

    def llama_cpp_of_report(self, target: Target) -> list[str]:
        """Result of llama.cpp, if its packages are installed and it computes the model."""
        is_measured = is_llama_cpp_installed() and fits_llama_cpp(self.planned_config(target))
        return [f"quality/{target.model}/llama_cpp.json"] * is_measured

    def throughput_of_report(self, target: Target) -> list[str]:
        """Speeds under load, if the report shows them."""
        is_shown = self.settings.report.throughput
        return self._results_of_report("throughput", target) if is_shown else []

    def _results_of_report(self, folder: str, target: Target) -> list[str]:
        return [
            f"{folder}/{target.model}/{variant}/{tp_size}-gpu.json"
            for variant, tp_size in self.engines_of_report
        ]


@functools.cache
def _config_at(folder: str, mtime_ns: int) -> MptConfig:
    """Reads a config.json; cached until the file changes, because many jobs need it."""
    return read_hf_config(Path(folder))


@functools.cache
def _spec_of(config: MptConfig, variant: Variant, tp_size: int) -> EngineSpec:
    """Makes a spec; cached, because many jobs need it."""
    return variant.spec(config, tp_size)


def _calibration_result(model: str, name: CalibrationName | None) -> list[str]:
    return [] if name is None else [f"quantized/{model}/{name.name}/{FILE_NAME}"]
