"""Makes Snakemake report failures in one sentence per problem, at the very end.

By default, Snakemake ends with the rule's source line, or with its own log file and "At least one
job did not complete successfully", after the reason and the command of the failed job.
"""

from __future__ import annotations

import difflib
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpt_trt.system.shown_paths import seen_from
from mpt_trt.workflow.target_names import TARGET_FORMS

# Rest of an error message of Python's exception handler, mpt-trt's tools, or a shell.
OUR_MESSAGE = re.compile(r"error(?: \(rank \d+ of \d+\))?: (?P<sentence>.+)")
# Time for the end of a failed job's log to arrive, from a pipe or a shared file system.
LATENCY_SECONDS = 2.0
NO_TARGET = re.compile(r"No rule to produce (?P<name>.+?) \(if you use input functions")
# Last line of a traceback about Snakemake's folder of records.
NO_RECORDS = re.compile(
    r"\n\w+Error: \[Errno \d+\] (?P<reason>.+): '(?P<path>.*/\.snakemake)(?:/.*)?'\s*$"
)
SEE_LOGS = "For further error details see"
LOOK_ABOVE = "Exiting because a job execution failed"
FAILED_COMMAND, FAILED_JOBS = "CalledProcessError", "At least one job did not complete successfully"


class LastWords(logging.Filter):
    """A filter for Snakemake's logger that replaces its reports of failures."""

    def __init__(self) -> None:
        super().__init__()
        self._refusals: list[str] = []
        self._failures: dict[str, tuple[str, list[str], str]] = {}

    def refuse(self, sentence: str) -> None:
        """Stores the reason for a failure of planning, in case it fails."""
        self._refusals.append(sentence)

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes a record about a failure; returns whether it has text left."""
        event = str(getattr(record, "event", ""))
        if str(record.msg).startswith(LOOK_ABOVE):
            return False
        if event == "job_error":
            self._note_failed_job(record)
        elif event == "error":
            return self._replace_error(record)
        return True

    def _note_failed_job(self, record: Any) -> None:
        rule, outputs = str(record.rule_name), ", ".join(record.output or ())
        # An executor's message, such as sbatch's, without Snakemake's advice after it.
        message = str(record.rule_msg or "").partition(SEE_LOGS)[0].strip()
        self._failures[f"{rule} {outputs}"] = rule, list(record.log or ()), message
        # Without the event, Snakemake prints the message unchanged.
        record.event = None
        record.msg = f"Failed: {rule} ({outputs})" if outputs else f"Failed: {rule}"

    def _replace_error(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if FAILED_COMMAND in text and "returned non-zero exit status" in text:
            return False
        if FAILED_JOBS in text and self._failures:
            sentences = (failure_in_words(*failure) for failure in self._failures.values())
            record.msg = "\n".join(f"error: {sentence}" for sentence in sentences)
        elif refusal := next((each for each in reversed(self._refusals) if each in text), None):
            record.msg = f"error: {refusal}"
        elif place := NO_RECORDS.search(text):
            record.msg = (
                f"error: {place['path']}: {place['reason']}; Snakemake keeps its records there, "
                "also of a dry run: choose a writable folder with --directory"
            )
        elif unknown := NO_TARGET.search(text):
            record.msg = f"error: {unknown_target_in_words(unknown['name'])}"
        return True


def failure_in_words(rule: str, logs: Iterable[str], executor_message: str = "") -> str:
    """Describes the reason for a job's failure, and the path of its log.

    The reason comes from the log, or from the executor if the job left none.
    """
    unknown = " ".join(executor_message.split()) or f"{rule} ended without a message"
    path = next(iter(logs), None)
    if path is None:
        return unknown
    return f"{_reason(Path(path)) or unknown} (log: {path})"


def _reason(log: Path) -> str | None:
    """Finds the message of the failed tool, otherwise the last line of the log."""
    lines: list[str] = []
    give_up = time.monotonic() + LATENCY_SECONDS
    while True:
        if log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        own = [match["sentence"] for line in lines if (match := OUR_MESSAGE.match(line))]
        if own:
            return own[-1]
        if time.monotonic() > give_up:
            return next((line.strip() for line in reversed(lines) if line.strip()), None)
        time.sleep(0.1)


def unknown_target_in_words(name: str) -> str:
    """Describes an unknown target, and the forms of targets."""
    inside = seen_from(Path.cwd(), Path(name))
    if Path(name).is_absolute() and not Path(inside).is_absolute():
        return f"no such target: {name}; targets are relative to the working directory: {inside}"
    folder = name.split("/")[0]
    folders = [form.split("/")[0] for form in TARGET_FORMS]
    near = difflib.get_close_matches(folder, folders, n=1)
    forms = [form for form in TARGET_FORMS if form.split("/")[0] in near] or TARGET_FORMS
    return f"no such target: {name}; targets look like {' or '.join(forms)}"
