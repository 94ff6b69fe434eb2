"""Comparison of benchmarks with recorded ratios; nothing is timed here."""

from __future__ import annotations

import json

import pytest
import regressions
from regressions import Ratio, Recorded, judged, read, record, table, value_of, write

LOWER, HIGHER = "build: memory to weights", "CPU, float32: rate to transformers'"


@pytest.mark.parametrize(
    ("now", "better", "expected"),
    [
        (2.0, "lower", ""),
        (2.2, "lower", ""),
        (2.21, "lower", "WORSE"),
        (1.8, "lower", ""),
        (1.79, "lower", "better"),
        (2.21, "higher", "better"),
        (1.79, "higher", "WORSE"),
    ],
)
def test_only_what_is_beyond_the_noise_is_marked(now, better, expected):
    assert judged(now, Recorded(2.0, 0.1001), better) == expected


def test_a_recording_is_the_median_and_the_distance_of_the_farthest_run():
    found = record([{"a": 2.0, "b": 1.0}, {"a": 1.5, "b": 1.0}, {"a": 2.2, "b": 1.01}])
    assert found == {"a": Recorded(2.0, 0.25), "b": Recorded(1.0, regressions.LEAST_NOISE)}


def test_the_table_shows_now_recorded_and_change_and_marks_what_is_worse():
    recorded = {LOWER: Recorded(1.0, 0.05), HIGHER: Recorded(2.0, 0.05)}
    _, *lines = table({LOWER: 1.5, HIGHER: 2.04}, recorded).splitlines()
    assert [line.split()[-4:] for line in lines] == [
        ["1.50", "1.00", "+50%", "WORSE"],
        ["transformers'", "2.04", "2.00", "+2%"],
    ]


def test_ratios_of_one_side_only_are_said():
    shown = table({LOWER: 1.5}, {HIGHER: Recorded(2.0, 0.05)})
    assert "not recorded" in shown
    assert f"{HIGHER}: recorded, but not measured" in shown


def test_a_ratio_is_found_in_a_result_or_made_of_two_values():
    result = {"runs": {"ours": {"seconds": 3}, "theirs": {"seconds": 4}}, "ratio": 1.5}
    ours, theirs = ("runs", "ours", "seconds"), ("runs", "theirs", "seconds")
    assert value_of(Ratio("", ("ratio",), "lower"), result) == 1.5
    assert value_of(Ratio("", ours, "lower", over=theirs), result) == 0.75


def test_what_is_written_is_read_again(tmp_path):
    recorded = {LOWER: Recorded(1.25, 0.05)}
    write(tmp_path / "ratios.json", recorded)
    found, machine = read(tmp_path / "ratios.json")
    assert found == recorded
    assert machine == json.loads(json.dumps(machine)) | {"gpus": machine["gpus"]}
    assert read(tmp_path / "missing.json") == ({}, None)


def test_every_ratio_of_the_short_set_is_recorded():
    names = [ratio.name for benchmark in regressions.SHORT_SET for ratio in benchmark.ratios]
    assert len(set(names)) == len(names)
    recorded, _ = read(regressions.RECORDED)
    assert set(recorded) == set(names)
