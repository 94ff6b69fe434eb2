"""Write the networks of all ranks: one rank{r}.onnx per rank, and their weights."""

from __future__ import annotations

import argparse

from mpt_trt.cli import engine_requests
from mpt_trt.cli import options as cli_options
from mpt_trt.engines.build.rank_network import NetworkInputs, make_networks
from mpt_trt.ft.checkpoint import read_ft_checkpoint


def run(options: argparse.Namespace) -> None:
    checkpoint = read_ft_checkpoint(options.model_dir, options.trust)
    inputs = NetworkInputs(
        checkpoint,
        cli_options.limits(options),
        cli_options.vocabulary(options),
        engine_requests.calibrated(options, checkpoint),
    )
    with engine_requests.networks_progress(inputs.spec) as advance:
        make_networks(inputs, options.output_dir, options.force, advance)
