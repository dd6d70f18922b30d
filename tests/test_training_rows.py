"""A batch size warmup under the real launcher: rows, samples and rates are the planned ones, also across a resume."""

import json

import pytest
from conftest import launch
from test_training import TRAIN, planned_samples, records, samples_by_step

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.run_data import open_run_data


@pytest.fixture(scope="module")
def warmup_run(tiny_run):
    """Rows 2 to 8 in the first 3,000 tokens, while lengths grow too."""
    warmup = {"start": 2, "increment": 2, "tokens": 3_000}
    return {**tiny_run, "batch_size_warmup": warmup, "training": {**tiny_run["training"], "keep_last": 99}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, warmup_run):
    """(folder of an uninterrupted run on two ranks, its output, its file)."""
    folder = tmp_path_factory.mktemp("warmup")
    (folder / "run.json").write_text(json.dumps(warmup_run))
    arguments = ("--config", folder / "run.json", "--save", folder / "run")
    status, output = launch(folder / "log", TRAIN, *arguments, ranks=2)
    assert status == 0, output
    return folder / "run", output, folder / "run.json"


def test_every_step_has_the_planned_rows_and_samples(trained, warmup_run):
    save, output, _ = trained
    config = RunConfig.from_dict(warmup_run)
    timeline, (train, _) = config.timeline(), open_run_data(config)
    rate, (steps, _) = config.learning_rate(timeline), records(save)
    planned = [
        (step, timeline.seqlen(step), timeline.rows(step), timeline.consumed_tokens(step), rate(step))
        for step in range(1, timeline.steps + 1)
    ]
    assert [tuple(r[name] for name in ("step", "seqlen", "rows", "consumed_tokens", "lr")) for r in steps] == planned
    assert {record["rows"] for record in steps} == {2, 4, 6, 8}
    assert samples_by_step(save) == planned_samples(train)
    assert output.count("warning: batch_size_warmup and curriculum_learning are both on") == 1  # on rank 0


def test_a_resume_amid_the_warmup_equals_the_uninterrupted_run(trained, warmup_run, tmp_path):
    save, _, run_file = trained
    timeline = RunConfig.from_dict(warmup_run).timeline()
    assert 2 < timeline.rows(30) < timeline.rows(timeline.steps)
    arguments = ("--config", run_file, "--save", tmp_path / "run", "--resume", save / "global_step30")
    status, output = launch(tmp_path / "log", TRAIN, *arguments, ranks=2)
    assert status == 0, output
    for ours, theirs in zip(records(tmp_path / "run"), records(save), strict=True):
        assert ours == [record for record in theirs if record["step"] > 30]
    samples = samples_by_step(save)
    assert samples_by_step(tmp_path / "run") == {step: ids for step, ids in samples.items() if step > 30}
