"""Steps before the configuration is read: find the package, and show failures plainly."""

import sys

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.errors import MptTrtError
from mpt_trt.workflow.config_sources import require_yaml
from mpt_trt.workflow.last_words import LastWords

# With --verbose, Snakemake's own messages are also printed.
last_words = LastWords()
if not workflow.output_settings.verbose:
    logger.addFilter(last_words)

try:
    require_yaml(CONFIG)
except MptTrtError as error:
    last_words.refuse(str(error))
    raise WorkflowError(str(error)) from None
