"""Checks against software and figures of others, and what they found when they last ran.

`docs/recorded` holds them: `external_checks.json` the tests, `proof-{model}.json` the proofs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mpt_trt.proofs.facts import SHIPPED, Fact, kind_of, read_facts
from mpt_trt.proofs.result import ProofResult, Verdict, read_proof
from mpt_trt.system.files import read_json
from mpt_trt.system.replace import replace_file
from mpt_trt.system.typed_json import from_json

RECORDED = "docs/recorded"
CHECKS = f"{RECORDED}/external_checks.json"


@dataclass(frozen=True)
class Recorded:
    """The last run of a check. found: numbers of tests. versions: of the peer's packages."""

    date: str
    found: str
    versions: str


@dataclass(frozen=True)
class Check:
    """Tests against a peer. packages: names in the registry. tests: paths; () if not repeatable."""

    name: str
    peer: str
    covers: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    recorded: Recorded | None


@dataclass(frozen=True)
class Checks:
    """All checks."""

    checks: tuple[Check, ...]


def read_checks(repository: Path) -> Checks:
    """Reads the checks; raises ValueError, naming the key, when the file is damaged."""
    return from_json(Checks, read_json(repository / CHECKS))


def write_checks(checks: Checks, repository: Path) -> None:
    """Writes the checks with their last runs."""
    with replace_file(repository / CHECKS) as partial:
        partial.write_text(json.dumps(asdict(checks), indent=2) + "\n", encoding="utf-8")


def tables(repository: Path) -> str:
    """Markdown tables of all checks and of all facts, for docs/proofs.md."""
    checks = [
        "### Checks against others' software\n",
        "| check | against | covers | last run | found |",
        "|---|---|---|---|---|",
        *(_check_row(check) for check in read_checks(repository).checks),
    ]
    return "\n".join(checks) + "\n\n" + "\n".join(_facts_of_models(repository))


def _check_row(check: Check) -> str:
    tests = ", ".join(f"`{test}`" for test in check.tests)
    covers = f"{check.covers} ({tests})" if tests else check.covers
    if check.recorded is None:
        return f"| {check.name} | {check.peer} | {covers} | not recorded | - |"
    peer = check.recorded.versions or check.peer
    return f"| {check.name} | {peer} | {covers} | {check.recorded.date} | {check.recorded.found} |"


def _facts_of_models(repository: Path) -> list[str]:
    files = {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}
    files["mpt-demo"] = repository / "resources" / "mpt-demo" / "facts.json"
    lines = []
    for model, path in sorted(files.items()):
        recorded = repository / RECORDED / f"proof-{model}.json"
        proof = read_proof(recorded) if recorded.is_file() else None
        lines += [f"### Facts about {model}\n", _summary(model, proof), ""]
        lines += ["| fact | kind | engine | tolerance, and why | found |", "|---|---|---|---|---|"]
        facts = read_facts(path).facts
        lines += [_fact_row(fact, proof) for fact in facts]
        lines += ["", "Sources:", ""]
        lines += [f"- {source}" for source in dict.fromkeys(fact.source for fact in facts)]
        lines.append("")
    return lines


def _summary(model: str, proof: ProofResult | None) -> str:
    if proof is None:
        return (
            "**Not run.** It needs the hub's weights, which were not available when mpt-trt was "
            f"developed: `snakemake proofs/{model}.json`."
        )
    runtimes = ", ".join(proof.runtimes)
    return f"Last run on {proof.date} with {runtimes}: {proof.summary}."


def _fact_row(fact: Fact, proof: ProofResult | None) -> str:
    verdicts = {verdict.name: verdict for verdict in proof.verdicts} if proof else {}
    found = _found(verdicts[fact.name]) if fact.name in verdicts else "not run"
    tolerance = f"{fact.tolerance:.3g}. {fact.reason}"
    cells = (fact.name, kind_of(fact), fact.engine.label, tolerance, found)
    return f"| {' | '.join(cells)} |"


def _found(verdict: Verdict) -> str:
    if verdict.deviation is None:
        return f"not checked: {verdict.problem}"
    return f"{verdict.status}, deviation {verdict.deviation:.2g}"
