"""No token is read twice in an epoch, and with recycling fewer than ``seq_length`` of each source are not read at all."""

import pickle
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.planning.summary import data_use
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.global_batch import BatchGrowth
from seqlen_curriculum.schedule.pacing import Discrete, Mixed, Root
from seqlen_curriculum.schedule.shortening import Shortening
from seqlen_curriculum.schedule.timeline import Timeline

NUM_TOKENS = 20_000


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """A corpus whose token at position p is p."""
    prefix = tmp_path_factory.mktemp("positions") / "corpus"
    with CorpusWriter(prefix, NUM_TOKENS) as writer:
        writer.add_document(np.arange(NUM_TOKENS))
    return IndexedCorpus(prefix)


class Case(NamedTuple):
    """A run: pieces of the corpus for each source, and how they are read."""

    seq_length: int
    ranges: list[list[int]]  # lengths in tokens, for each source
    weights: list[float] | None
    pacing: object
    rows: object
    world_size: int
    method: str
    recycle: bool
    epochs: float
    seed: int


@st.composite
def cases(draw):
    full = draw(st.integers(1, 16))
    length = st.integers(1, full)
    lowest, step = draw(length), draw(length)
    step = min(step, lowest)
    pacing = draw(
        st.one_of(
            st.builds(
                Root, st.just(lowest), st.just(full), st.just(step), st.integers(1, 30), st.sampled_from([0.5, 1, 2])
            ),
            st.builds(lambda first, last, at: Discrete((first, last), (at,)), length, length, st.integers(1, 30)),
            st.builds(lambda a, b, m, n: Mixed((a, b), (m, n)), length, length, st.integers(1, 5), st.integers(1, 5)),
        )
    )
    of_source = st.lists(st.integers(1, 12 * full), max_size=2)
    ranges = [[draw(st.integers(full + 1, 12 * full + 1)), *draw(of_source)] for _ in range(draw(st.integers(1, 3)))]
    weight = st.sampled_from([0.1, 0.25, 1.0, 3])
    weights = [draw(weight) for _ in ranges] if len(ranges) > 1 else None
    world = draw(st.sampled_from([1, 2, 4]))
    batch = world * draw(st.integers(1, 3))
    rising = st.builds(BatchSizeRamp, st.just(world), st.just(world), st.integers(1, 50 * full), st.just(batch + world))
    return Case(
        full,
        ranges,
        weights,
        pacing,
        draw(st.just(batch) | rising | st.builds(BatchGrowth, st.just(batch), st.integers(1, 3 * batch * full))),
        world,
        draw(st.sampled_from(["truncate", "segment", "window"])),
        draw(st.booleans()),
        draw(st.floats(0.2, 2.5)),
        draw(st.integers(0, 2**32)),
    )


def build(case, corpus):
    """The run's training data; the run is over when the smallest source was read about ``epochs`` times."""
    sources, position = [], 0
    for lengths in case.ranges:
        bounds = np.cumsum([position, *lengths])
        position = int(bounds[-1])
        ranges = [(corpus, int(a), int(b)) for a, b in pairwise(bounds)]
        sources.append(Samples(ranges, case.seq_length, case.seed))
    tokens = max(int(case.epochs * min(source.num_tokens for source in sources)), 1)
    timeline = Timeline(case.pacing, case.rows, tokens, Shortening(case.method, case.seq_length))
    return TrainingData(sources, timeline, case.recycle, case.weights)


def read_by_epoch(data, world_size):
    """{(source, epoch): positions of the targets trained on}, read rank by rank."""
    timeline, read = data.timeline, {}
    for step in range(1, timeline.steps + 1):
        share = timeline.samples(step) // world_size
        parts = [data.read(step, rank * share, share) for rank in range(world_size)]
        inputs, targets = (np.concatenate(tokens) for tokens in zip(*parts, strict=True))
        assert np.array_equal(targets, inputs + 1)
        assert inputs.shape == (timeline.rows(step), timeline.shortening.tokens_per_row(timeline.seqlen(step)))
        by_sample = targets.reshape(timeline.samples(step), -1)
        ids = data.sample_ids(step)
        for source, epoch, tokens in zip(ids.source.tolist(), ids.epoch.tolist(), by_sample, strict=True):
            read.setdefault((source, epoch), []).append(tokens)
    return {key: np.concatenate(tokens) for key, tokens in read.items()}


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_token_is_read_once_an_epoch(positions, case):
    assert_every_token_is_read_once_an_epoch(positions, case)


@pytest.mark.slow
@settings(max_examples=4000, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_token_is_read_once_an_epoch_in_many_cases(positions, case):
    assert_every_token_is_read_once_an_epoch(positions, case)


def assert_every_token_is_read_once_an_epoch(positions, case):
    data = build(case, positions)
    timeline = data.timeline
    read = read_by_epoch(data, case.world_size)
    trained = sum(len(tokens) for tokens in read.values())
    assert trained == timeline.consumed_tokens(timeline.steps)
    for number, source in enumerate(data.sources):
        trainable = np.concatenate([np.arange(first + 1, end) for _, first, end in source.ranges])
        epochs = sorted(epoch for of, epoch in read if of == number)
        assert epochs == list(range(len(epochs)))
        for epoch in epochs:
            tokens = read[number, epoch]
            assert len(np.unique(tokens)) == len(tokens), "a token was read twice in an epoch"
            assert np.isin(tokens, trainable).all()
            if case.recycle and epoch < epochs[-1]:
                assert len(trainable) - len(tokens) < case.seq_length
    if not case.recycle:
        planned = data_use(timeline, case.seq_length, recycle=False)
        assert planned["dropped_tokens"] == planned["sample_tokens"] - trained
        assert planned["sample_tokens"] == case.seq_length * sum(
            len(data.sample_ids(step).source) for step in range(1, timeline.steps + 1)
        )


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_spans_are_what_is_read(positions, case):
    data = build(case, positions)
    for step in {1, (data.timeline.steps + 1) // 2, data.timeline.steps}:
        inputs, _ = data.read(step)
        covered = np.full((data.timeline.samples(step), inputs.size // data.timeline.samples(step)), -1)
        for source, parts in data.token_spans(step):
            for row, column, length, number, start in zip(*parts, strict=True):
                _, first, end = data.sources[source].ranges[number]
                assert first <= start < start + length < end
                assert (covered[row, column : column + length] == -1).all()
                covered[row, column : column + length] = np.arange(start, start + length)
        assert np.array_equal(covered.reshape(inputs.shape), inputs)


def test_blends_are_read_in_proportion(positions):
    sources = [Samples([(positions, 0, 1001)], 10, 1), Samples([(positions, 2000, 2101)], 10, 1)]
    data = TrainingData(sources, Timeline(Discrete((4,), ()), 8, 4000), True, [0.75, 0.25])
    ids = [data.sample_ids(step) for step in range(1, data.timeline.steps + 1)]
    source = np.concatenate([of_step.source for of_step in ids])
    count = np.cumsum(source)
    assert np.abs(count - np.arange(1, len(source) + 1) / 4).max() < 1
    epochs = np.concatenate([of_step.epoch for of_step in ids])
    # 1000 samples of 4 tokens: 750 of the first are 3 epochs of 1000 tokens; 250 of the second 10 epochs of 100.
    assert (epochs[source == 0].max(), epochs[source == 1].max()) == (3, 10)


def test_samples_outside_a_step_and_missing_weights(positions):
    data = TrainingData([Samples([(positions, 0, 1001)], 10, 1)], Timeline(Discrete((4,), ()), 8, 4000), False)
    assert data.read(3, 6)[0].shape == (2, 4)
    with pytest.raises(IndexError, match=r"samples 6..9 are outside the 8 samples of step 3"):
        data.read(3, 6, 3)
    with pytest.raises(ConfigError, match=r"data.train: 1 sources and 2 weights"):
        TrainingData(data.sources, data.timeline, False, [1, 2])


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_another_process_reads_the_same(positions, case):
    data = build(case, positions)
    steps = {1, (data.timeline.steps + 1) // 2, data.timeline.steps}
    before = [data.read(step) for step in steps]  # fills its caches
    copy = pickle.loads(pickle.dumps(data))
    for step, tokens in zip(steps, before, strict=True):
        assert np.array_equal(copy.read(step), tokens)
        assert np.array_equal(copy.sample_ids(step), data.sample_ids(step))


def test_a_pickle_holds_no_tokens(positions):
    timeline = Timeline(Discrete((4,), ()), 8, 4000)
    data = TrainingData([Samples([(positions, 0, NUM_TOKENS)], 10, 1)], timeline, True)
    assert len(pickle.dumps(data)) < 5000
