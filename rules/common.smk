"""What all stages share: the checked configuration, names in paths, which files a step runs through."""

import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = Path(workflow.basedir) / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))

from mpt_trt import hub, seals
from mpt_trt.errors import MptTrtError
from mpt_trt.settings import Model, Variant, parse_settings
from mpt_trt.source_files import source_hash

# Jobs run the Python that runs Snakemake, unless a conda environment or container takes over.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# Storage type of an FT checkpoint, by the name that stands in its path.
STORAGES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


wildcard_constraints:
    model="[^/]+",
    variant="[^/]+",
    storage="[^/]+",
    tp="[1-9][0-9]*",
    rank="[0-9]+",


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


def version_of(script: str) -> str:
    """Hash of a script and the library modules behind it: an edit makes its outputs anew."""
    return source_hash(SCRIPTS / script)


def ranks(wildcards) -> range:
    return range(int(wildcards.tp))


def seal(folder: str) -> str:
    """The output that seals the directory output `folder`; see mpt_trt.seals."""
    return seals.seal_path(folder)


def intact(folder: str):
    """An input function that adds no input, but has the folder made again when it is damaged."""

    def break_seal_if_damaged(wildcards) -> list[str]:
        seals.break_if_damaged(Path(folder.format(**wildcards)))
        return []

    return break_seal_if_damaged
