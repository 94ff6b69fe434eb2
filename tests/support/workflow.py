"""A working directory in which tests run the real workflow on a small model."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from support.checkpoints import CheckpointSpec, write_checkpoint
from support.forks.servers import forked_python
from support.paths import REPOSITORY

LINKED = ("Snakefile", "rules", "report", "profiles", "envs", "resources")
COPIED = ("mpt_trt", "workflow_scripts")
SPEC = CheckpointSpec(
    hidden_size=48, num_heads=6, num_layers=2, vocab_size=131, max_seq_len=128, seed=5
)
CALIBRATION = {"text": "calibration.txt", "num_samples": 4, "sequence_length": 32}
SMALL = {"max_batch_size": 4, "max_input_len": 24, "max_output_len": 16}


@dataclass(frozen=True)
class Workflow:
    """A working directory with its own config.yaml and a copy of the code that a test may edit.

    snakefile: that of another folder; None for the one in this folder.
    """

    folder: Path
    snakefile: Path | None = None

    @classmethod
    def create(cls, folder: Path) -> Workflow:
        folder.mkdir(parents=True)
        for name in LINKED:
            (folder / name).symlink_to(REPOSITORY / name)
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
        write_checkpoint(folder / "model", SPEC)
        (folder / "calibration.txt").write_text("what the toy model reads; it is short. " * 20)
        workflow = cls(folder)
        workflow.configure()
        return workflow

    def configure(self, **variants: dict) -> None:
        """Writes config.yaml with variants fp32 and fp16, changed or extended by `variants`.

        Quality is measured on text.txt, which the test writes.
        """
        content = {
            "models": {"toy": {"source": "model"}},
            "variants": {
                "fp32": {"dtype": "float32", **SMALL},
                "fp16": {"dtype": "float16", **SMALL},
                **variants,
            },
            "calibration": CALIBRATION,
            "smoke_test": {"prompt": "hello", "max_new_tokens": 6},
            "quality": {"text": "text.txt", "num_windows": 3, "window_length": 16},
            "report": {"more_tp_sizes": {"fp16": [2]}},
        }
        (self.folder / "config.yaml").write_text(yaml.safe_dump(content))

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self._run(arguments, environment, subprocess.PIPE)

    def last_line(self, *arguments: str) -> str:
        """Last line on screen of a run that must fail."""
        result = self._run(arguments, {}, subprocess.STDOUT)
        assert result.returncode != 0
        assert "Traceback" not in result.stdout
        return result.stdout.rstrip().split("\n")[-1]

    def _run(
        self, arguments: Iterable[str], environment: dict[str, str], stderr: int
    ) -> subprocess.CompletedProcess[str]:
        other = [] if self.snakefile is None else ["--snakefile", str(self.snakefile)]
        return subprocess.run(
            [forked_python(), "-m", "snakemake", "--cores", "2", *other, *arguments],
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
        )

    def make(self, *targets: str) -> list[str]:
        """Makes the targets; returns the rules that ran, in order, `name` or `name variant`."""
        result = self.run(*targets)
        output = result.stdout + result.stderr
        assert result.returncode == 0, output
        return _jobs(output)

    def planned(self, *targets: str, **environment: str) -> list[str]:
        """The rules that would run."""
        result = self.run("--dry-run", *targets, **environment)
        output = result.stdout + result.stderr
        assert result.returncode == 0, output
        return _jobs(output)

    def edit_module(self, name: str) -> None:
        """Appends a comment to a library module."""
        with (self.folder / "mpt_trt" / name).open("a") as stream:
            stream.write("\n# edited\n")


def _jobs(output: str) -> list[str]:
    """Parses Snakemake's announcements: `rule NAME:` and, below it, `wildcards: ...`."""
    jobs: list[str] = []
    for line in output.splitlines():
        words = line.split()
        if words[:1] in (["rule"], ["localrule"]) and len(words) == 2:
            jobs.append(words[1].rstrip(":"))
        elif words[:1] == ["wildcards:"] and jobs:
            wildcards = dict(word.rstrip(",").split("=", 1) for word in words[1:])
            for name in ("variant", "storage", "qformat"):
                if name in wildcards:
                    jobs[-1] += f" {wildcards[name]}"
    return jobs
