"""A run's ``run.json``, and the loss and perplexity ratios."""

import json
import math
import os

import numpy as np
import pytest
from helpers.command import slw

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.run_folder.ratios import loss_ratio, perplexity_ratio, perplexity_ratios
from seqlen_curriculum.run_folder.run_info import read_run_info

LAUNCH = {"started": "2024-01-01T00:00:00+00:00", "ranks": 2, "first_step": 1, "versions": {}, "device": {"cpu": "x"}}


def write_log(save):
    record = {"step": 1, "consumed_tokens": 8, "seqlen": 8, "rows": 1, "loss": 5.0, "lr": 0.1, "seconds": 0.1}
    (save / "runlog.jsonl").write_text(json.dumps(record) + "\n")


def test_there_may_be_none(tmp_path):
    assert read_run_info(tmp_path) is None


def test_keys_of_other_versions_are_kept(tmp_path):
    from seqlen_curriculum.training.run_info import record_launch

    info = {"config": {"lr": 1}, "launches": [{**LAUNCH, "job": "7"}], "made_by": "a later version"}
    (tmp_path / "run.json").write_text(json.dumps(info))
    assert read_run_info(tmp_path).launches[0].ranks == 2
    record_launch(tmp_path, {"lr": 2}, ranks=1, first_step=5)
    written = json.loads((tmp_path / "run.json").read_text())
    assert (written["config"], written["made_by"]) == ({"lr": 2}, "a later version")
    assert written["launches"][0] == {**LAUNCH, "job": "7"}
    assert list(written["launches"][1]) == list(LAUNCH)


def test_a_damaged_file_is_kept_beside_the_new_one(tmp_path, capsys):
    from seqlen_curriculum.training.run_info import record_launch

    (tmp_path / "run.json").write_text('{"config": {}, "launches": [{"ranks": 4}]}')
    record_launch(tmp_path, {"lr": 2}, ranks=1, first_step=5)
    assert json.loads((tmp_path / "run.damaged.json").read_text())["launches"] == [{"ranks": 4}]
    assert [launch.first_step for launch in read_run_info(tmp_path).launches] == [5]
    assert "launches.0.started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "key"),
    [("{", "run.json"), ('{"config": {}}', "launches"), ('{"config": {}, "launches": [1]}', "launches.0")],
)
def test_a_damaged_file_is_named(tmp_path, text, key):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"{key}.*"):
        read_run_info(tmp_path)


def test_ratios_by_hand():
    assert loss_ratio(3.0, 2.0) == 1.5
    assert [loss_ratio(*pair) for pair in ((3.0, math.inf), (math.nan, 2.0), (3.0, 0.0))] == [None, None, None]
    assert perplexity_ratio(4.0, 3.0) == math.e
    assert perplexity_ratio(900.0, 899.0) == math.e  # of perplexities that no float holds
    assert perplexity_ratio(1e4, 1.0) == math.exp(700)


def test_perplexity_ratios_are_to_the_least_before():
    ratios = perplexity_ratios([4.0, 5.0, 2.0, 2.5])  # the least before: -, 4, 4, 2
    assert math.isnan(ratios[0])
    assert np.array_equal(ratios[1:], [math.exp(1.0), math.exp(-2.0), math.exp(0.5)])
    assert perplexity_ratios([]).tolist() == []


def test_a_folder_whose_name_is_no_utf_8_is_reported(tmp_path):
    save = tmp_path / os.fsdecode(b"run\xff")
    save.mkdir()
    write_log(save)
    finished = slw("report", save, "--out", tmp_path / "report", "--json")
    assert finished.returncode == 0
    assert json.loads(finished.stdout)["runs"][0]["name"] == "run?"
    assert "run?" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("launches", "config", "message"),
    [
        ('[{"ranks": -1}]', "{}", "launches.0.started: "),
        ("[]", '{"a": NaN}', "Out of range float"),
        ("[]", '{"a": "\\ud800"}', "can't be read"),
    ],
)
def test_a_record_of_no_run_is_named(tmp_path, launches, config, message):
    (tmp_path / "run.json").write_text(f'{{"launches": {launches}, "config": {config}}}')
    with pytest.raises(CheckpointError, match=r"run\.json: can't be read") as caught:
        read_run_info(tmp_path)
    assert message in str(caught.value)


def test_a_record_without_launches_is_reported(tmp_path):
    write_log(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {}, "launches": []}')
    assert slw("report", tmp_path, "--json").returncode == 0
