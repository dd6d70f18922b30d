"""No token is read twice in an epoch, and with recycling fewer than ``seq_length`` of each source are not read at all."""

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
from seqlen_curriculum.planning import data_use
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
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
        draw(st.just(batch) | rising),
        world,
        draw(st.sampled_from(["truncate", "segment", "window"])),
        draw(st.booleans()),
        draw(st.floats(0.2, 2.5)),
        draw(st.integers(0, 2**32)),
    )


def build(case, corpus):
    """The run's feed; it is over when the smallest source was read about ``epochs`` times."""
    sources, position = [], 0
    for lengths in case.ranges:
        bounds = np.cumsum([position, *lengths])
        position = int(bounds[-1])
        ranges = [(corpus, int(a), int(b)) for a, b in pairwise(bounds)]
        sources.append(Samples(ranges, case.seq_length, case.seed))
    tokens = max(int(case.epochs * min(source.num_tokens for source in sources)), 1)
    timeline = Timeline(case.pacing, case.rows, tokens, Shortening(case.method, case.seq_length))
    return TrainingData(sources, timeline, case.recycle, case.weights)


def read_by_epoch(feed, world_size):
    """{(source, epoch): positions of the targets trained on}, read rank by rank."""
    timeline, read = feed.timeline, {}
    for step in range(1, timeline.steps + 1):
        share = timeline.samples(step) // world_size
        parts = [feed.read(step, rank * share, share) for rank in range(world_size)]
        inputs, targets = (np.concatenate(tokens) for tokens in zip(*parts, strict=True))
        assert np.array_equal(targets, inputs + 1)
        assert inputs.shape == (timeline.rows(step), timeline.shortening.tokens_per_row(timeline.seqlen(step)))
        by_sample = targets.reshape(timeline.samples(step), -1)
        places = feed.places(step)
        for source, epoch, tokens in zip(places.source.tolist(), places.epoch.tolist(), by_sample, strict=True):
            read.setdefault((source, epoch), []).append(tokens)
    return {key: np.concatenate(tokens) for key, tokens in read.items()}


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_token_is_read_once_an_epoch(positions, case):
    assert_every_token_is_read_once_an_epoch(positions, case)


@pytest.mark.slow
@settings(max_examples=4000, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_token_is_read_once_an_epoch_in_many_cases(positions, case):
    assert_every_token_is_read_once_an_epoch(positions, case)


def assert_every_token_is_read_once_an_epoch(positions, case):
    feed = build(case, positions)
    timeline = feed.timeline
    read = read_by_epoch(feed, case.world_size)
    trained = sum(len(tokens) for tokens in read.values())
    assert trained == timeline.consumed_tokens(timeline.steps)
    for number, source in enumerate(feed.sources):
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
            len(feed.places(step).source) for step in range(1, timeline.steps + 1)
        )


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_stretches_are_what_is_read(positions, case):
    feed = build(case, positions)
    for step in {1, (feed.timeline.steps + 1) // 2, feed.timeline.steps}:
        inputs, _ = feed.read(step)
        found = np.full((feed.timeline.samples(step), inputs.size // feed.timeline.samples(step)), -1)
        for source, parts in feed.token_spans(step):
            for row, column, length, number, start in zip(*parts, strict=True):
                _, first, end = feed.sources[source].ranges[number]
                assert first <= start < start + length < end
                assert (found[row, column : column + length] == -1).all()
                found[row, column : column + length] = np.arange(start, start + length)
        assert np.array_equal(found.reshape(inputs.shape), inputs)


def test_blends_are_read_in_proportion(positions):
    sources = [Samples([(positions, 0, 1001)], 10, 1), Samples([(positions, 2000, 2101)], 10, 1)]
    feed = TrainingData(sources, Timeline(Discrete((4,), ()), 8, 4000), True, [0.75, 0.25])
    places = [feed.places(step) for step in range(1, feed.timeline.steps + 1)]
    source = np.concatenate([place.source for place in places])
    count = np.cumsum(source)
    assert np.abs(count - np.arange(1, len(source) + 1) / 4).max() < 1
    epochs = np.concatenate([place.epoch for place in places])
    # 1000 samples of 4 tokens: 750 of the first are 3 epochs of 1000 tokens; 250 of the second 10 epochs of 100.
    assert (epochs[source == 0].max(), epochs[source == 1].max()) == (3, 10)


def test_what_a_step_has_not(positions):
    feed = TrainingData([Samples([(positions, 0, 1001)], 10, 1)], Timeline(Discrete((4,), ()), 8, 4000), False)
    assert feed.read(3, 6)[0].shape == (2, 4)
    with pytest.raises(IndexError, match=r"samples 6..9 are outside the 8 of step 3"):
        feed.read(3, 6, 3)
    with pytest.raises(ConfigError, match=r"data.train: 1 sources and 2 weights"):
        TrainingData(feed.sources, feed.timeline, False, [1, 2])
