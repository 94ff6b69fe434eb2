"""What all stages share: the checked configuration, and the functions that rules take values from."""

import functools
import gc
import inspect
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

REPOSITORY = Path(workflow.basedir)
SCRIPTS = REPOSITORY / "workflow_scripts"
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.workflow import target_names, seals
from mpt_trt.checkpoint import known_models
from mpt_trt.checkpoint.source import is_hub_id
from mpt_trt.engines import memory
from mpt_trt.model import sharding
from mpt_trt.engines.backend_support import require_supported
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.model.config import MptConfig
from mpt_trt.engines.spec import TENSORRT_LLM, EngineSpec
from mpt_trt.engines.tensorrt.packages import choose_package
from mpt_trt.system.process import prefer_this_python
from mpt_trt.errors import MptTrtError
from mpt_trt.checkpoint.files import checkpoint_files
from mpt_trt.quantization.schemes import as_mapping, require_fitting_groups
from mpt_trt.workflow.settings import Model, Variant, parse_settings
from mpt_trt.system.code_version import source_hash
from mpt_trt.workflow.trtllm_sources import trtllm_calibration, trtllm_ft_storage

prefer_this_python()

# Planning makes millions of objects that stay. Python's usual search for garbage among them took a
# quarter of the time.
gc.set_threshold(100_000, 50, 50)


wildcard_constraints:
    model="[^/]+",
    variant="[^/]+",
    storage="[^/]+",
    qformat="[^/]+",
    tp="[1-9][0-9]*",


def readable(function):
    """Reads its parameters once, instead of whenever Snakemake calls it."""
    function.__signature__ = inspect.signature(function)
    return function


def checked(function, *arguments):
    """Calls `function`; its complaint about bad input becomes Snakemake's one-line error."""
    try:
        return function(*arguments)
    except MptTrtError as error:
        raise WorkflowError(str(error)) from None


settings = checked(parse_settings, config)


def model_of(wildcards) -> Model:
    return checked(settings.model, wildcards.model)


def variant_of(wildcards) -> Variant:
    return checked(settings.variant, wildcards.variant)


NO_VARIANT = "(?!)"


def only_variants(names: tuple[str, ...]) -> str:
    """A wildcard constraint: one of these names."""
    return "|".join(map(re.escape, names)) or NO_VARIANT


def other_variants(names: tuple[str, ...]) -> str:
    """A wildcard constraint: any name but these, also one that config.yaml does not have."""
    return f"(?!(?:{only_variants(names)})/)[^/]+"


def version_of(*scripts: str) -> str:
    """Hash of scripts and the library modules behind them: an edit makes their outputs anew."""
    return "-".join(source_hash(SCRIPTS / script) for script in scripts)


def stored_config(wildcards) -> MptConfig | None:
    """The model's architecture, where its config.json is on disk already."""
    folder = checkpoint_folder(wildcards)
    try:
        return config_at(folder, os.stat(f"{folder}/config.json").st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return None


@functools.cache
def config_at(folder: str, mtime_ns: int) -> MptConfig:
    """Read once, since many jobs ask for it, and again when the file has changed."""
    return checked(read_hf_config, Path(folder))


def planned_config(wildcards) -> MptConfig:
    """The model's architecture or, before it is fetched, that of the known model of its name.

    Of a hub model that is not known either, MPT-7B's is assumed.
    """
    if (config := stored_config(wildcards)) is not None:
        return config
    name = Path(model_of(wildcards).source).name
    return known_models.known_config(name if name in known_models.SHIPPED else "mpt-7b")


def engine_spec(wildcards) -> EngineSpec:
    """What the jobs of an engine's target are planned for."""
    config, tp_size = planned_config(wildcards), int(wildcards.tp)
    # Possible before the model is fetched; what one rank of one needs is enough for each.
    legal = tp_size if sharding.is_legal(config, tp_size) else 1
    return spec_of(config, variant_of(wildcards), legal)


@functools.cache
def spec_of(config: MptConfig, variant: Variant, tp_size: int) -> EngineSpec:
    """Made once, since many jobs ask for it."""
    return checked(variant.spec, config, tp_size)


def megabytes(size: int) -> int:
    """A job's `mem_mb`, from what its command needs in bytes."""
    return -(-size // 10**6) + settings.site.job_overhead_mb


def intact(folder: str):
    """An input function that adds no input, but has the folder made again when it is damaged.

    The rule seals what it has made; see mpt_trt.workflow.seals. There must be a folder among the job's
    inputs: of small files Snakemake compares the content, and unchanged ones do not make an output
    anew, however old it is.
    """

    @readable
    def break_seal_if_damaged(wildcards) -> list[str]:
        seals.break_if_damaged(Path(folder.format(**wildcards)))
        return []

    return break_seal_if_damaged


# checkpoint.smk


def is_on_hub(model: Model) -> bool:
    return is_hub_id(model.source)


def checkpoint_folder(wildcards) -> str:
    """Folder of the model in Hugging Face format: its own, or where its hub files are linked."""
    model = model_of(wildcards)
    return f"checkpoints/{wildcards.model}" if is_on_hub(model) else model.source


def checkpoint_inputs(wildcards) -> list[str]:
    """What a step that reads the checkpoint depends on."""
    folder = checkpoint_folder(wildcards)
    if is_on_hub(model_of(wildcards)):
        return [folder]
    # The folder itself, too: see `intact`.
    return [folder, *(str(path) for path in checked(checkpoint_files, Path(folder)))]


def legal_tp(wildcards) -> list[str]:
    """An input function that adds no input, but refuses a number of ranks that cannot be.

    Of a model that is not fetched yet, the conversion refuses it.
    """
    if (config := stored_config(wildcards)) is not None:
        checked(sharding.require_legal, config, int(wildcards.tp))
    return []


def conversion_mem_mb(wildcards, threads: int) -> int:
    return megabytes(memory.conversion_memory(threads))


def hub_source(wildcards) -> str:
    return model_of(wildcards).source


def hub_revision(wildcards) -> str:
    return model_of(wildcards).revision


def storage_type(wildcards) -> str:
    return checked(target_names.ft_storage, wildcards.storage).storage_type


def smoothing_alpha(wildcards) -> float:
    return checked(target_names.ft_storage, wildcards.storage).alpha


# quantize.smk

NPZ_NAME = "mpt_tp1_rank0.npz"


def tokenizer_option(wildcards) -> list[str]:
    tokenizer = model_of(wildcards).tokenizer
    return [] if tokenizer is None else [f"--tokenizer_dir={tokenizer}"]


def calibration_options(wildcards) -> list[str]:
    """What to calibrate for, as command-line options."""
    found = checked(target_names.calibration_name, wildcards.qformat)
    options = [f"--qformat={found.quantization_format}"]
    # Without a size in the name, it is the model's default, which quantize.py knows.
    if found.group_size is not None:
        options.append(f"--awq_block_size={found.group_size}")
    return options


def calibration_mem_mb(wildcards) -> int:
    calibration = settings.calibration
    return megabytes(
        memory.calibration_memory(
            planned_config(wildcards), calibration.num_samples, calibration.sequence_length
        )
    )


# engine.smk

LIMITS = ("max_batch_size", "max_input_len", "max_output_len")


def ft_checkpoint_of_variant(wildcards) -> str:
    variant = variant_of(wildcards)
    name = target_names.ft_storage_of(variant.dtype, variant.quantization).name
    return f"ft_ckpts/{wildcards.model}/{name}/{wildcards.tp}-gpu"


def limit_options(wildcards) -> list[str]:
    """The variant's limits as command-line options."""
    variant = variant_of(wildcards)
    options = [f"--{name}={getattr(variant, name)}" for name in LIMITS]
    return options + ["--gather_all_token_logits"] * variant.gather_all_token_logits


def vocabulary_options(wildcards) -> list[str]:
    """Which of the vocabulary's matrices ranks share, as command-line options."""
    variant = variant_of(wildcards)
    return [
        "--shard_embedding" if variant.shard_embedding else "--no-shard_embedding",
        "--shard_head" if variant.shard_head else "--no-shard_head",
    ]


def calibration_of_variant(wildcards) -> list[str]:
    """The calibration result that the network needs, if any."""
    variant = variant_of(wildcards)
    found = target_names.calibration_of(variant.quantization, variant.kv_cache_dtype)
    return [] if found is None else [f"quantized/{wildcards.model}/{found.name}/{NPZ_NAME}"]


def fitting_groups(wildcards) -> list[str]:
    """An input function that adds no input, but refuses groups that ranks would share.

    Of a model that is not fetched yet, the network's step refuses them.
    """
    group_size = getattr(variant_of(wildcards).quantization, "group_size", None)
    if group_size is not None and (config := stored_config(wildcards)) is not None:
        checked(require_fitting_groups, config, int(wildcards.tp), group_size)
    return []


def quantization_options(wildcards) -> list[str]:
    """The variant's quantization as command-line options."""
    variant = variant_of(wildcards)
    options = as_mapping(variant.quantization)
    method, group_size = options.pop("method"), options.pop("group_size", None)
    found = [f"--quantization={method}", f"--kv_cache_dtype={variant.kv_cache_dtype}"]
    # The groups of int4_awq are what the calibration result says.
    if group_size is not None and method == "int4_weight_only":
        found.append(f"--group_size={group_size}")
    if method == "smoothquant":
        found.append(f"--alpha={options['alpha']}")
        for name in ("per_channel", "per_token"):
            found.append(f"--{name}" if options[name] else f"--no-{name}")
    return found


def calibration_option(wildcards) -> list[str]:
    return [f"--calibration={path}" for path in calibration_of_variant(wildcards)]


def network_mem_mb(wildcards) -> int:
    return megabytes(memory.network_memory(engine_spec(wildcards)))


def build_mem_mb(wildcards) -> int:
    return megabytes(ranks_at_once(wildcards) * memory.build_memory(engine_spec(wildcards)))


def backend(wildcards) -> str:
    """The package that builds the plan, with `auto` resolved."""
    return checked(choose_package, variant_of(wildcards).backend, site_has_gpus()).module


def backend_version(wildcards) -> str:
    """Recorded with the plan, so that an upgrade of the package builds it again."""
    return checked(choose_package, variant_of(wildcards).backend, site_has_gpus()).version


def compute_capabilities(wildcards) -> tuple[str, ...]:
    return variant_of(wildcards).compute_capabilities


# trtllm.smk

# Their engines are not made of our own network.
TENSORRT_LLM_VARIANTS = settings.variants_of(TENSORRT_LLM)
# More than any machine has; Snakemake takes as many as there are.
ALL_CORES = 4096
TENSORRT_LLM_CONTAINER = "docker://nvcr.io/nvidia/tensorrt-llm/release:1.2.1"


def what_trtllm_can(wildcards) -> list[str]:
    """An input function that adds no input, but refuses what TensorRT-LLM's MPT model has not.

    Of a model that is not fetched yet, the conversion refuses it.
    """
    if (config := stored_config(wildcards)) is not None:
        variant, tp_size = variant_of(wildcards), int(wildcards.tp)
        checked(require_supported, spec_of(config, variant, tp_size), TENSORRT_LLM)
    return []


def ft_checkpoint_for_trtllm(wildcards) -> str:
    variant = variant_of(wildcards)
    name = trtllm_ft_storage(variant.dtype, variant.quantization).name
    return f"ft_ckpts/{wildcards.model}/{name}/{wildcards.tp}-gpu"


def calibration_for_trtllm(wildcards) -> list[str]:
    found = trtllm_calibration(variant_of(wildcards).quantized)
    return [] if found is None else [f"quantized/{wildcards.model}/{found.name}/{NPZ_NAME}"]


def calibration_option_for_trtllm(wildcards) -> list[str]:
    return [f"--calibration={path}" for path in calibration_for_trtllm(wildcards)]


def tokenizer_folder(wildcards) -> str:
    return model_of(wildcards).tokenizer or checkpoint_folder(wildcards)


def gpu_of_every_rank(wildcards) -> int:
    return int(wildcards.tp)


# verify.smk


def tolerance_options(wildcards) -> list[str]:
    tolerance = variant_of(wildcards).tolerance
    return [
        f"--max_abs={tolerance.max_abs}",
        f"--mean_kl={tolerance.mean_kl}",
        f"--min_top1={tolerance.min_top1}",
    ]


# report.smk


def measurable_variant(wildcards) -> list[str]:
    """An input function that adds no input, but refuses engines that no runtime of ours reads."""
    if variant_of(wildcards).backend == TENSORRT_LLM:
        raise WorkflowError(
            f"quality of {wildcards.variant}: under backend {TENSORRT_LLM} there are smoke tests "
            "alone; measure a variant with another backend"
        )
    return []


def reference_mem_mb(wildcards) -> int:
    quality, config = settings.quality, planned_config(wildcards)
    return megabytes(memory.reference_memory(config, quality.num_windows, quality.window_length))


def quality_mem_mb(wildcards) -> int:
    quality, spec = settings.quality, engine_spec(wildcards)
    return megabytes(memory.quality_memory(spec, quality.num_windows, quality.window_length))


def fitting_window(wildcards) -> list[str]:
    """An input function that adds no input, but refuses windows that the engine has no room for."""
    checked(engine_spec(wildcards).limits.require_window, settings.quality.window_length)
    return []


engines_of_report = checked(settings.engines_of_report)


def variants_of_report(wildcards) -> list[str]:
    """The variant of each engine that a report shows."""
    return [variant for variant, _ in engines_of_report]


def results_of_report(folder: str):
    """An input function: a result in `folder` of each engine that a report shows."""

    @readable
    def files(wildcards) -> list[str]:
        return [
            f"{folder}/{wildcards.model}/{variant}/{tp_size}-gpu.json"
            for variant, tp_size in engines_of_report
        ]

    return files
