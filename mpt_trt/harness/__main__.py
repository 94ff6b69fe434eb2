"""lm-eval's own command line, with engines as the model `mpt_trt`.

python -m mpt_trt.harness --model mpt_trt --model_args engine_dir=my_engine --tasks wikitext
"""

from __future__ import annotations

import os
import sys

from mpt_trt.errors import MptTrtError
from mpt_trt.harness.registry import register
from mpt_trt.harness.tasks import require_lm_eval
from mpt_trt.system import mpi
from mpt_trt.system.process import wait_without_spinning


def main() -> None:
    """Runs lm-eval's command line. Under mpirun, only rank 0 prints and writes results."""
    require_lm_eval()
    from lm_eval._cli import HarnessCLI  # optional
    from lm_eval.utils import setup_logging

    wait_without_spinning()
    register()
    setup_logging()
    parser = HarnessCLI()
    options = parser.parse_args()
    if mpi.is_another_rank():
        options.output_path, options.log_samples = None, False
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (up to the end)
    parser.execute(options)


if __name__ == "__main__":
    try:
        main()
    except MptTrtError as error:
        print(f"error{mpi.rank_label()}: {error}", file=sys.stderr)
        mpi.end_all_ranks(1)
        raise SystemExit(1) from None
