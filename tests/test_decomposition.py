"""``data.order: "decomposed"``: what a file may say, the lengths that it draws, and what plan and inspect print."""

import json
from fractions import Fraction

import numpy as np
import pytest
from helpers.command import slw
from helpers.settings import changed

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.data.from_config import open_training_data, with_buckets
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.schedule.buckets import Buckets, SourceBuckets, draw_lengths
from seqlen_curriculum.schedule.row_shares import RowShares


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A corpus of 20 documents of 25 tokens = 16 + 8 + 1: 500 tokens, of which 499 are targets."""
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    with CorpusWriter(prefix, 257) as writer:
        for number in range(20):
            writer.add_document([*([number] * 24), 256])
    return str(prefix)


@pytest.fixture
def run(prefix):
    return {
        "train_batch_size": 4,
        "data": {"train": [prefix], "seq_length": 16, "split": "1", "order": "decomposed", "min_piece_tokens": 4},
        "training": {"train_tokens": 1280, "eval_interval": 0},
    }


SCHEDULE = {
    "enabled": True,
    "min_difficulty": 8,
    "max_difficulty": 16,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 1},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seq_length": 24}, "data: seq_length: 24 is not a power of two, .*16 or 32"),
        ({"data__min_piece_tokens": 6}, "data: min_piece_tokens: 6 is not a power of two, .*4 or 8"),
        ({"data__min_piece_tokens": 32}, "data: min_piece_tokens: 32 is above seq_length 16"),
        ({"data__leftovers": "recycle"}, 'data: leftovers: "recycle" has no effect with order "decomposed"'),
        ({"data__order": "packed"}, 'data: min_piece_tokens: 4 needs order "decomposed"'),
        ({"data__bucket_cycles": 2}, 'data: bucket_cycles: 2 needs bucket_curriculum "grow"'),
        (
            {"data__bucket_curriculum": "grow", "data__bucket_odds": [2.0, 1.0]},
            "data: bucket_odds: has 2 entries for the 3 lengths from min_piece_tokens 4 to seq_length 16",
        ),
        (
            {"batch_size_warmup": {"start": 2, "increment": 2, "tokens": 500}},
            "batch_size_warmup: doesn't work together",
        ),
        ({"training__seqlen_bucket": 8}, "training.seqlen_bucket: 8 doesn't work together"),
        ({"curriculum_learning": SCHEDULE | {"method": "segment"}}, 'curriculum_learning.method: "segment" doesn\'t'),
        ({"curriculum_learning": SCHEDULE | {"method": "window"}}, 'curriculum_learning.method: "window" doesn\'t'),
        (
            {"curriculum_learning": SCHEDULE | {"batch_growth": True, "min_tokens_per_step": 32}},
            "curriculum_learning.batch_growth: true doesn't work together",
        ),
        (
            {"curriculum_learning": SCHEDULE, "data__bucket_curriculum": "uniform"},
            'data.bucket_curriculum: "uniform" and curriculum_learning both set the length',
        ),
        (
            {"curriculum_learning": SCHEDULE | {"min_difficulty": 12}},
            "curriculum_learning.min_difficulty: 12 is not the length of a piece .* 4, 8, 16",
        ),
        (
            {"curriculum_learning": SCHEDULE | {"min_difficulty": 2}},
            "curriculum_learning.min_difficulty: 2 is not the length of a piece",
        ),
    ],
)
def test_settings_that_contradict_pieces_are_refused(run, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        RunConfig.from_dict(changed(run, **changes))
    assert len(error.value.problems) == 1


def test_the_default_shortest_piece_is_a_32nd(run):
    data = {"train": ["c"], "order": "decomposed"}
    for seq_length, lengths in ((1024, (32, 64, 128, 256, 512, 1024)), (16, (1, 2, 4, 8, 16)), (1, (1,))):
        config = RunConfig.from_dict({"data": {**data, "seq_length": seq_length}})
        assert config.data.piece_lengths == lengths


def test_a_packed_run_has_the_settings_of_older_checkpoints(run):
    packed = RunConfig.from_dict(changed(run, data__order="packed", data__min_piece_tokens=None)).settings()
    assert [key for key in packed if key.startswith("data.")] == [
        "data.seq_length",
        "data.split",
        "data.leftovers",
        "data.weights",
    ]
    assert RunConfig.from_dict(run).settings()["data.order"] == "decomposed"


def test_lengths_that_depend_on_the_corpus_need_it(run):
    config = RunConfig.from_dict(run)
    with pytest.raises(ConfigError, match=r'data.bucket_curriculum: "uniform" depends on the documents'):
        config.timeline()
    assert with_buckets(config).timeline().steps == 20  # of 4 x 16 tokens
    # A schedule gives the lengths without a corpus: 8 up to step 9 of 10, rounded down to a piece's length.
    config = RunConfig.from_dict({**run, "curriculum_learning": SCHEDULE})
    timeline = config.timeline()
    assert timeline.seqlen(np.arange(1, 12)).tolist() == [8] * 9 + [16, 16]
    assert timeline.rows(np.array([9, 10])).tolist() == [8, 4]
    assert timeline.samples_at(8, np.array([0, 1, 9, 20])).tolist() == [0, 8, 72, 72]
    assert timeline.samples_at(16, 20) == 44


def test_a_ramp_as_a_fraction_ends_where_it_says(run):
    schedule = SCHEDULE | {"schedule_config": {"curriculum_fraction": 0.5, "difficulty_step": 1}}
    assert RunConfig.from_dict({**run, "curriculum_learning": schedule}).timeline().first_step_at(16) == 10


def test_another_schedule_is_the_same_run_while_its_steps_are(run):
    def settings(**changes):
        return RunConfig.from_dict(changed({**run, "curriculum_learning": SCHEDULE}, **changes)).settings()

    later = settings(curriculum_learning__schedule_config={"total_curriculum_step": 12, "difficulty_step": 1})
    assert trains_identically(settings(), later, 9)
    assert not trains_identically(settings(), later, 10)
    # Rates by tokens: at 64 tokens per step, 5 steps of warmup are 320 tokens at every length.
    warmup = {"type": "TokenCosineLR", "params": {"warmup_tokens": 320, "decay_tokens": 640}}
    rated = changed({**run, "curriculum_learning": SCHEDULE}, train_batch_size=4) | {
        "optimizer": {"type": "Adam", "params": {"lr": 1.0}},
        "scheduler": warmup,
    }
    assert RunConfig.from_dict(rated).plan.learning_rate()(5) == 1.0
    # The cycles of grow depend on the budget, and on pieces that settings don't have.
    grow = changed(run, data__bucket_curriculum="grow")
    longer = RunConfig.from_dict(changed(grow, training__train_tokens=2560)).settings()
    assert not trains_identically(RunConfig.from_dict(grow).settings(), longer, 1)


def test_a_length_without_pieces_is_refused(run, prefix):
    schedule = SCHEDULE | {"min_difficulty": 4}
    config = RunConfig.from_dict({**run, "curriculum_learning": schedule})
    with pytest.raises(DataError, match=r"steps of 4 tokens, and no document of .* has a piece of that length"):
        open_training_data(config)


def test_other_loops_are_refused(run):
    with pytest.raises(ConfigError, match=r"data.order: not available in another trainer"):
        TrainerPlan.of(run, global_batch=4)


def buckets(*pieces, lengths=(8, 16, 32)):
    return Buckets(lengths, (SourceBuckets("c", 1.0, pieces, 0),))


def listed(drawn, steps):
    return drawn(np.arange(1, steps + 1)).tolist()


def test_uniform_draws_are_in_proportion_to_tokens_in_every_part():
    # 64, 128 and 64 tokens: draws at 2, 6, 10, ... of 8 and 32, and at 1, 3, 5, ... of 16.
    assert listed(draw_lengths(buckets(8, 8, 2), 8), 8) == [16, 8, 32, 16, 16, 8, 32, 16]
    drawn = draw_lengths(buckets(3, 0, 50), 1000)
    lengths = np.array(listed(drawn, 1000))
    assert set(lengths.tolist()) == {8, 32}
    count = np.cumsum(lengths == 8)
    assert np.abs(count - np.arange(1, 1001) * 24 / 1624).max() <= 0.5
    assert listed(draw_lengths(buckets(3, 0, 50), 70), 70) == lengths[:70].tolist()  # a longer run begins the same


def test_grow_draws_the_same_steps_short_ones_first_in_each_cycle():
    uniform = draw_lengths(buckets(8, 8, 4), 30)  # 64, 128, 128 tokens
    grow = draw_lengths(buckets(8, 8, 4), 30, 2, [4.0, 2.0, 1.0])
    for first in (0, 15):
        part = listed(grow, 30)[first : first + 15]
        assert sorted(part) == sorted(listed(uniform, 30)[first : first + 15])
    # 3, 6 and 6 draws: of 8 at 1/8, 3/8, 5/8, of 16 at 1/4, 3/4, 5/4, 7/4, 9/4, 11/4, of 32 at 1/2, 3/2, ..., 11/2.
    assert listed(grow, 30)[:15] == [8, 16, 8, 32, 8, 16, 16, 32, 16, 16, 32, 16, 32, 32, 32]


def test_too_many_steps_are_refused(run):
    config = changed(run, training__train_tokens=2**22 * 64 + 1)
    with pytest.raises(ConfigError, match=r"training.train_tokens: takes 4,194,305 steps"):
        with_buckets(RunConfig.from_dict(config)).timeline()


def test_rows_are_shared_exactly_at_any_ratio():
    weights = [3, 0, 10**7, 1]
    shares = RowShares([Fraction(weight) for weight in weights])
    rows = np.concatenate([np.arange(4000), 2**40 + np.arange(4000)])
    source, index = shares.locate(rows)
    assert set(source.tolist()) <= {0, 2, 3}
    for number, row, at in zip(source.tolist(), rows.tolist(), index.tolist(), strict=True):
        assert shares.count(number, row) == at
        assert shares.count(number, row + 1) == at + 1
    for number, weight in enumerate(weights):
        assert abs(shares.count(number, 2**40) / 2**40 - weight / sum(weights)) < 2**-30
    assert sum(shares.count(number, 2**40) for number in range(4)) == 2**40


def test_plan_and_inspect_show_the_buckets(run, prefix, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    planned = json.loads(slw("plan", path, "--json").stdout)["pieces"]
    # The first document has 24 targets, 16 + 8; the others 16 + 8 + 1. 1,280 tokens are 20 steps, in proportion 2 to 1.
    expected = {"name": prefix, "weight": 1, "tokens": 480, "dropped_tokens": 19}
    assert {key: planned[0][key] for key in expected} == expected
    assert planned[0]["buckets"] == [
        {"length": 4, "pieces": 0, "tokens": 0, "steps": 0, "rows": 0, "epochs": 0},
        {"length": 8, "pieces": 20, "tokens": 160, "steps": 7, "rows": 56, "epochs": 2.8},
        {"length": 16, "pieces": 20, "tokens": 320, "steps": 13, "rows": 52, "epochs": 2.6},
    ]
    assert json.loads(slw("inspect", path, "--json").stdout)["pieces"] == planned
    text = slw("plan", path).stdout
    assert "480 tokens, 19 dropped in pieces below 4 (3.81%)" in text
    assert "tokens of samples" not in text
    assert "480 tokens, 19 dropped in pieces below 4 (3.81%)" in slw("inspect", path).stdout
    corpus = json.loads(slw("inspect", prefix, "--seq-length", 16, "--decomposed", 4, "--json").stdout)["corpora"][0]
    assert corpus["pieces"][0]["tokens"] == 480
    assert [bucket["pieces"] for bucket in corpus["pieces"][0]["buckets"]] == [0, 20, 20]
    assert "19 dropped" in slw("inspect", prefix, "--seq-length", 16, "--decomposed", 4).stdout


def test_a_step_names_the_documents_of_its_pieces(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    step = json.loads(slw("inspect", path, "--step", 1, "--json").stdout)
    for sample in step["ranks"][0]["shown"]:
        (span,) = sample["stretches"]
        first, last = span["documents"]
        assert first == last
        assert set(sample["ids"][0]) <= {256, first}


def test_the_index_is_measured_on_a_sparse_corpus(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    arguments = ("benchmark", "pieces", path, "--documents", 3000, "--rounds", 1, "--folder", tmp_path)
    record = json.loads(slw(*arguments, "--json").stdout)["pieces"]
    assert (record["documents"], record["steps"], record["batch"]) == (3000, 20, 4)
    # 16-byte fingerprint, and for 1, 2, 4, 8 and 16 tokens the pieces before each of 94 blocks, and all; numpy's header.
    assert record["index_bytes"] == 128 + 16 + 5 * 95 * 8
    assert record["tokens"] > record["pieces"] > 3000
    assert "3,000 documents" in slw(*arguments).stdout
    packed = slw(*arguments, "--set", "data.order=packed", "--set", "data.min_piece_tokens=null")
    assert (packed.returncode, 'data.order: "packed" has no pieces' in packed.stderr) == (1, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decomposed", 4], "--decomposed 4: needs --seq-length"),
        (["--seq-length", 24, "--decomposed", 4], "24 is not a power of two"),
    ],
)
def test_mistakes_of_inspect_are_one_line(prefix, flags, message):
    done = slw("inspect", prefix, *flags)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_plan_without_its_corpus_says_so(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(changed(run, data__train=[str(tmp_path / "absent")])))
    done = slw("plan", path)
    assert (done.returncode, "no corpus here" in done.stderr) == (1, True)
