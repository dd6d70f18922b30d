"""Under the real launcher: rows that rise, corpora that blend, leftovers, segments and windows are read as planned."""

import json

import numpy as np
import pytest
from helpers.launching import forked, launch
from helpers.runs import TRAIN, Runs, planned_samples, records, samples_by_step
from helpers.runs import run as run_of

from seqlen_curriculum import RunConfig
from seqlen_curriculum.analysis.benchmark import describe_documents
from seqlen_curriculum.data.from_config import open_run_data, with_buckets
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.run_folder.run_log import read_run_log

SMALL = ["training.train_tokens=1400", "training.eval_interval=9", "model.dropout=0.0", "training.save_interval=6"]
RECYCLED = 6
"""The step of a small run's checkpoint, with a window or segments still short."""
SMALL_RUNS = {
    "segment": ['curriculum_learning.method="segment"', "zero_optimization.stage=2"],
    "window": ['curriculum_learning.method="window"', "zero_optimization.stage=3"],
    "window-ulysses": ['curriculum_learning.method="window"', "sequence_parallel_size=2", "zero_optimization.stage=1"],
    "window-tensor": [
        'curriculum_learning.method="window"',
        "tensor_parallel.autotp_size=2",
        "zero_optimization.stage=1",
    ],
    "documents": [
        'curriculum_learning.method="window"',
        'data.attention="document"',
        "data.eod_mask_loss=true",
        "zero_optimization.stage=3",
        "model.activation_checkpointing=true",
    ],
    "documents-tensor": [
        'curriculum_learning.method="window"',
        'data.attention="document"',
        "data.eod_mask_loss=true",
        "tensor_parallel.autotp_size=2",
        "zero_optimization.stage=1",
    ],
    "window-pipeline": ['curriculum_learning.method="window"', "pipeline.stages=2", "zero_optimization.stage=1"],
}
PIECES = [
    "batch_size_warmup=null",
    "curriculum_learning=null",
    "data.leftovers=drop",
    "data.order=decomposed",
    "data.min_piece_tokens=8",
    "data.bucket_curriculum=grow",
    "data.bucket_cycles=2",
    "training.train_tokens=4000",
    "training.eval_interval=9",
    "training.save_interval=6",
]
"""A run on pieces of documents of both corpora: 16 steps of 256 tokens."""


@pytest.fixture(scope="module")
def blended_run(tiny_run, tmp_path_factory):
    """Rows 2 to 8 in the first 3,000 tokens, while lengths grow too; two corpora, read more than once."""
    folder = tmp_path_factory.mktemp("blend")
    draw = np.random.default_rng(1)
    for name, tokens in (("wiki", 3000), ("books", 1200)):
        with CorpusWriter(folder / name, vocab_size=257) as writer:
            for part in np.split(draw.integers(0, 256, tokens), 10):
                writer.add_document([*part, 256])
    warmup = {"start": 2, "increment": 2, "tokens": 3_000}
    blend = [[0.7, str(folder / "wiki")], [0.3, str(folder / "books")]]
    data = {"train": blend, "valid": tiny_run["data"]["train"], "seq_length": 32, "leftovers": "recycle"}
    return {
        **tiny_run,
        "batch_size_warmup": warmup,
        "data": data,
        "training": {**tiny_run["training"], "keep_last": 99},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, blended_run):
    """(folder of an uninterrupted run on two ranks, its output, its file)."""
    folder = tmp_path_factory.mktemp("warmup")
    (folder / "run.json").write_text(json.dumps(blended_run))
    arguments = ("--config", folder / "run.json", "--save", folder / "run")
    status, output = launch(folder / "log", TRAIN, *arguments, ranks=2, launcher=forked)
    assert status == 0, output
    return folder / "run", output, folder / "run.json"


def test_every_step_has_the_planned_rows_and_samples(trained, blended_run):
    save, output, _ = trained
    config = RunConfig.from_dict(blended_run)
    timeline, (train, _) = config.timeline(), open_run_data(config)
    rate, (steps, _) = config.plan.learning_rate(), records(save)
    planned = [
        (step, timeline.seqlen(step), timeline.rows(step), timeline.consumed_tokens(step), rate(step))
        for step in range(1, timeline.steps + 1)
    ]
    assert [tuple(r[name] for name in ("step", "seqlen", "rows", "consumed_tokens", "lr")) for r in steps] == planned
    assert {record["rows"] for record in steps} == {2, 4, 6, 8}
    assert samples_by_step(save) == planned_samples(train)
    assert output.count("warning: batch_size_warmup and curriculum_learning are both on") == 1  # on rank 0


def test_the_log_of_samples_covers_both_corpora_epoch_by_epoch(trained, blended_run):
    """From the log and the lengths alone: how many tokens of each epoch were trained on."""
    config = RunConfig.from_dict(blended_run)
    timeline, (train, _) = config.timeline(), open_run_data(config)
    tokens, numbers = {}, {}
    for step, samples in samples_by_step(trained[0]).items():
        for source, epoch, number in samples:
            tokens[source, epoch] = tokens.get((source, epoch), 0) + timeline.seqlen(step)
            numbers.setdefault((source, epoch), []).append(number)
    for source, samples in enumerate(train.sources):
        epochs = sorted(epoch for of, epoch in tokens if of == source)
        assert len(epochs) >= 2
        for epoch in epochs:
            assert numbers[source, epoch] == list(range(len(numbers[source, epoch])))
            assert max(numbers[source, 0]) >= samples.num_samples  # leftovers were read
        for epoch in epochs[:-1]:
            assert samples.num_tokens - 32 < tokens[source, epoch] <= samples.num_tokens
    counted = [sum(len(n) for (of, _), n in numbers.items() if of == source) for source in (0, 1)]
    assert abs(counted[0] - 0.7 * sum(counted)) < 1


WSD = 'scheduler={"type": "TokenWSDLR", "params": {"warmup_steps": 5, "decay_tokens": 600, "min_lr": 1e-4}}'
"""A rate that falls in the last 600 tokens; the length and the rows of a step still grow."""
STABLE = 18
"""A step of these runs with a checkpoint, before any decay."""


@pytest.fixture(scope="module")
def continued(trained):
    """The folder of further runs: the blend continued on two ranks and on one, and small runs of each method."""
    save, _, run_file = trained
    folder = save.parent

    def run(name, sets=(), resume="auto", after=None, **more):
        return run_of(run_file, folder / name, sets, resume, after=after, **more)

    resume = save / "global_step30"
    small = [run(name, [*SMALL, *sets]) for name, sets in SMALL_RUNS.items()]
    again = run(
        "window-resumed", [*SMALL, *SMALL_RUNS["window"]], folder / "window" / f"global_step{RECYCLED}", "window"
    )
    documents_again = run(
        "documents-resumed",
        [*SMALL, *SMALL_RUNS["documents"]],
        folder / "documents" / f"global_step{RECYCLED}",
        "documents",
    )
    runs = Runs(folder)
    pieces = run("pieces", PIECES)
    pieces_again = run("pieces-resumed", PIECES, folder / "pieces" / "global_step6", "pieces")
    data_parallel = [run("resumed", (), resume), pieces, pieces_again, *small[:2], again, small[4], documents_again]
    runs.launch("two", [*data_parallel, *small[2:4], *small[5:]], ranks=2)
    one = {
        "segment": SMALL_RUNS["segment"][:1],
        "window": SMALL_RUNS["window"][:1],
        "documents": SMALL_RUNS["documents"][:3],
    }
    references = [run(f"{name}-one", [*SMALL, *sets]) for name, sets in one.items()]
    restarted = run("restarted", [*SMALL, *one["window"], "curriculum_learning.restart_positions=true"])
    cooled = [
        run("wsd-planned", [*SMALL, WSD]),
        run("wsd-long", [*SMALL, WSD, "training.train_tokens=4000"], until_step=STABLE),
        run("wsd-cooled", [*SMALL, WSD], folder / "wsd-long" / f"global_step{STABLE}", "wsd-long"),
    ]
    pieces_on_one = run("pieces-one", PIECES, folder / "pieces" / "global_step6")
    measured = run("measured", SMALL, measures=True)
    runs.launch("one", [run("one-rank", (), resume), pieces_on_one, *references, restarted, *cooled, measured], ranks=1)
    return runs


def assert_same(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) == len(other)
        for ours_, theirs_ in zip(one, other, strict=True):
            for name, value in ours_.items():
                rounded = tolerance if name.endswith(("loss", "_ppl", "_norm", "_max")) else 0.0
                expected = theirs_[name]
                if not isinstance(expected, str):
                    expected = pytest.approx(expected, rel=rounded, abs=0.0)
                assert value == expected, (name, ours_, theirs_)


def test_a_resume_during_the_warmup_equals_the_uninterrupted_run(trained, continued, blended_run):
    save, _, _ = trained
    timeline = RunConfig.from_dict(blended_run).timeline()
    assert 2 < timeline.rows(30) < timeline.rows(timeline.steps)
    for ours, theirs in zip(records(continued["resumed"]), records(save), strict=True):
        assert ours == [record for record in theirs if record["step"] > 30]
    samples = {step: read for step, read in samples_by_step(save).items() if step > 30}
    assert samples_by_step(continued["resumed"]) == samples


def test_pieces_of_documents_are_trained_on_as_planned_and_resumed_exactly(trained, continued):
    _, _, run_file = trained
    config = with_buckets(RunConfig.load(run_file, PIECES))
    (train, _), timeline, rate = open_run_data(config), config.timeline(), config.plan.learning_rate()
    steps, evaluations = records(continued["pieces"])
    planned = [
        (step, timeline.seqlen(step), timeline.rows(step), 256 * step, rate(step))
        for step in range(1, timeline.steps + 1)
    ]
    assert [tuple(r[name] for name in ("step", "seqlen", "rows", "consumed_tokens", "lr")) for r in steps] == planned
    assert {(record["seqlen"], record["rows"]) for record in steps} == {(8, 32), (16, 16), (32, 8)}
    samples = samples_by_step(continued["pieces"])
    assert samples == planned_samples(train)
    assert {source for read in samples.values() for source, _, _ in read} == {0, 1}
    for name, tolerance in (("pieces-resumed", 0.0), ("pieces-one", 2e-5)):
        later = [record for record in steps if record["step"] > 6], evaluations
        assert_same(records(continued[name]), later, tolerance)
        assert samples_by_step(continued[name]) == {step: read for step, read in samples.items() if step > 6}


@pytest.mark.parametrize("name", SMALL_RUNS)
def test_each_method_trains_as_on_one_rank(continued, trained, name):
    config = RunConfig.load(trained[2], [*SMALL, SMALL_RUNS[name][0]])
    timeline, (train, _) = config.timeline(), open_run_data(config)
    steps, evaluations = records(continued[name])
    assert [(r["seqlen"], r["rows"], r["consumed_tokens"]) for r in steps] == [
        (timeline.seqlen(step), timeline.rows(step), timeline.consumed_tokens(step))
        for step in range(1, timeline.steps + 1)
    ]
    assert samples_by_step(continued[name]) == planned_samples(train)
    assert evaluations
    assert_same((steps, evaluations), records(continued[f"{name.split('-')[0]}-one"]), 2e-4)


@pytest.mark.parametrize("name", ["window", "documents"])
def test_windows_and_documents_resume_to_the_last_bit(continued, name):
    expected = [[r for r in part if r["step"] > RECYCLED] for part in records(continued[name])]
    assert_same(records(continued[f"{name}-resumed"]), expected, 0.0)


def test_attention_stops_at_document_ends_which_are_counted(continued, trained):
    train, _ = open_run_data(RunConfig.load(trained[2], [*SMALL, *SMALL_RUNS["documents"][:3]]))
    steps, evaluations = records(continued["documents"])
    counted = [train.document_rows(record["step"]).num_first_targets for record in steps]
    assert [record["document_starts"] for record in steps] == counted
    assert sum(counted) > 5
    assert {(record["attention"], record["eod_mask_loss"]) for record in evaluations} == {("document", True)}
    whole_rows, evaluations_of_rows = records(continued["window"])
    assert all("document_starts" not in record for record in whole_rows)
    assert all("attention" not in record for record in evaluations_of_rows)
    differences = [abs(one["loss"] - other["loss"]) for one, other in zip(steps, whole_rows, strict=True)]
    assert 1e-4 < max(differences) < 1


def test_a_cool_down_from_a_stable_checkpoint_is_the_run_that_had_it_planned(continued, trained):
    plan = RunConfig.load(trained[2], [*SMALL, WSD]).plan
    assert 5 < STABLE < plan.timeline.steps_to(plan.learning_rate().decay.start) < plan.steps - 1
    assert plan.timeline.seqlen(STABLE) < 32  # the length still grows during the decay
    planned = records(continued["wsd-planned"])
    for name, ours in (("wsd-long", lambda step: step <= STABLE), ("wsd-cooled", lambda step: step > STABLE)):
        for part, whole in zip(records(continued[name]), planned, strict=True):
            assert part == [record for record in whole if ours(record["step"])]
    assert records(continued["wsd-cooled"])[0][-1]["lr"] == 1e-4


def test_positions_may_restart_in_each_window(continued):
    runs_on, restarts = records(continued["window-one"])[0], records(continued["restarted"])[0]
    assert 0 < abs(restarts[0]["loss"] - runs_on[0]["loss"]) < 0.1 * runs_on[0]["loss"]


def test_the_blend_continues_on_another_number_of_ranks(continued, trained):
    samples = {step: read for step, read in samples_by_step(trained[0]).items() if step > 30}
    assert samples_by_step(continued["one-rank"]) == samples


def test_rows_documents_and_pieces_are_measured_at_equal_tokens(continued, trained):
    record = json.loads((continued["measured"] / "record.json").read_text())
    assert (record["step_tokens"], record["steps"]) == (
        256,
        2,
    )  # 8 rows of 32, without the file's curriculum and warmup
    assert list(record["ways"]) == ["row", "document", "decomposed"]
    assert record["ways"]["row"]["cpu_throughput"] == 1
    assert all(value > 0 for way in record["ways"].values() for value in way.values())
    assert "| document | " in describe_documents(record)
    steps = read_run_log(continued["measured"] / "log" / "runlog.jsonl")
    assert sorted(step["step"] for step in steps) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
