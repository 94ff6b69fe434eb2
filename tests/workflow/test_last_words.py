"""Snakemake's output after a failure ends with the sentence of the tool that failed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mpt_trt.workflow import last_words
from mpt_trt.workflow.last_words import LastWords, failure_in_words


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_words, "LATENCY_SECONDS", 0.0)


def shown(words: LastWords, message: str, **fields: object) -> str | None:
    """Filters a message of Snakemake with `fields`; returns its text, or None."""
    record = logging.makeLogRecord({"msg": message} | fields)
    return record.msg if words.filter(record) else None


def test_a_refusal_is_shown_without_its_place() -> None:
    words = LastWords()
    words.refuse("config.yaml has no model named 'x'")
    text = """InputFunctionException in rule smoke_test in file "rules/verify.smk", line 9:
Error:
  WorkflowError:
    config.yaml has no model named 'x'
Traceback:
  File "rule_values.py", line 31, in value"""
    assert shown(words, text, event="error") == "error: config.yaml has no model named 'x'"
    assert shown(words, "anything else", event="error") == "anything else"
    assert shown(words, text) == text


def test_failed_jobs_are_told_at_the_end_with_their_logs(tmp_path: Path) -> None:
    words = LastWords()
    for name, content in {
        "one.log": "Loading\nerror: a.bin: damaged; make it again\nMPI_ABORT was invoked\n\n",
        "two.log": "Traceback (most recent call last):\n  File x\nKeyError: 1\n",
        "three.log": "error (rank 1 of 2): lost\nerror: last\n",
    }.items():
        (tmp_path / name).write_text(content)
        fields = {
            "rule_name": "build",
            "output": [f"{name}.engine"],
            "log": [str(tmp_path / name)],
            "rule_msg": None,
        }
        failed = {"msg": "long", "event": "job_error", "rule_msg": None}
        record = logging.makeLogRecord(failed | fields)
        assert words.filter(record)
        assert (record.msg, record.event) == (f"Failed: build ({name}.engine)", None)
    command = "CalledProcessError in file x:\nCommand y returned non-zero exit status 1."
    assert shown(words, command, event="error") is None
    assert shown(words, "Exiting because a job execution failed. Look above") is None
    end = "WorkflowError:\nAt least one job did not complete successfully."
    assert shown(words, end, event="error") == "\n".join(
        [
            f"error: a.bin: damaged; make it again (log: {tmp_path}/one.log)",
            f"error: KeyError: 1 (log: {tmp_path}/two.log)",
            f"error: last (log: {tmp_path}/three.log)",
        ]
    )


def test_a_job_that_was_killed_has_no_message(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    for content in (None, "", "\n"):
        if content is not None:
            log.write_text(content)
        assert failure_in_words("r", [str(log)]) == f"r ended without a message (log: {log})"
    assert failure_in_words("r", []) == "r ended without a message"


def test_a_job_that_the_cluster_rejects_is_told_in_the_clusters_words(tmp_path: Path) -> None:
    """A log that the job left takes precedence."""
    words, log = LastWords(), tmp_path / "a.log"
    sbatch = "SLURM sbatch failed.\nsbatch: error: Requested node configuration is not available "
    advice = "For further error details see the cluster/cloud log and the log files"
    fields = {"rule_name": "r", "output": ["x"], "log": [str(log)], "rule_msg": sbatch + advice}
    end = "WorkflowError:\nAt least one job did not complete successfully."
    words.filter(logging.makeLogRecord({"msg": "long", "event": "job_error"} | fields))
    reason = "SLURM sbatch failed. sbatch: error: Requested node configuration is not available"
    assert shown(words, end, event="error") == f"error: {reason} (log: {log})"
    log.write_text("error: damaged\n")
    assert shown(words, end, event="error") == f"error: damaged (log: {log})"


def test_a_folder_that_takes_no_records_is_told_in_one_sentence() -> None:
    text = """Traceback (most recent call last):

  File "snakemake/persistence/__init__.py", line 261, in __init__
    os.makedirs(self.path, exist_ok=True)

OSError: [Errno 30] Read-only file system: '/my checkout/.snakemake'
"""
    assert shown(LastWords(), text, event="error") == (
        "error: /my checkout/.snakemake: Read-only file system; Snakemake keeps its records "
        "there, also of a dry run: choose a writable folder with --directory"
    )
    other = text.replace("/.snakemake", "/model")
    assert shown(LastWords(), other, event="error") == other


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("smoke_test/m/fp16/1-gpu.json", "smoke_tests/{model}/{variant}/{tp}-gpu.json"),
        ("trt_engines/m/fp16", "trt_engines/{model}/{variant}/{tp}-gpu"),
        ("report/m.html", "reports/{model}.html"),
    ],
)
def test_an_unknown_target_is_told_what_targets_look_like(name: str, form: str) -> None:
    text = f"MissingRuleException:\nNo rule to produce {name} (if you use input functions make"
    assert shown(LastWords(), text, event="error") == (
        f"error: no such target: {name}; targets look like {form}"
    )


def test_an_absolute_target_is_told_its_relative_name() -> None:
    name = Path.cwd() / "ft_ckpts/m/fp16/1-gpu"
    text = f"MissingRuleException:\nNo rule to produce {name} (if you use input functions make"
    assert shown(LastWords(), text, event="error") == (
        f"error: no such target: {name}; targets are relative to the working directory: "
        "ft_ckpts/m/fp16/1-gpu"
    )
