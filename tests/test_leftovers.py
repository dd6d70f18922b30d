"""Leftovers by hand: what an epoch reads after its fresh samples, and where it ends."""

import os

import numpy as np
import pytest

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.leftovers import Epochs
from seqlen_curriculum.data.sample_stream import SampleStream
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.piecewise import Piecewise


def pieces(*rows_and_values):
    """(first row, value), ...; the first row is 1."""
    first, values = zip(*rows_and_values, strict=True)
    return Piecewise(np.array(first, np.int64), np.array(values, np.int64))


def epochs(tokens, seq_length, used, rows):
    epoch, start = Epochs(tokens // seq_length, tokens, seq_length, used).of(np.arange(rows))
    return epoch.tolist(), start.tolist()


def test_dropping_an_epoch_is_its_fresh_samples():
    assert epochs(35, 8, None, 10) == ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 4, 4, 4, 4, 8, 8])


def test_an_epoch_ends_when_what_is_left_fills_no_sample():
    # 20 tokens, samples of 8. Rows use 3: after 5 rows 15 > 20 - 8 = 12 are used, 5 are left.
    assert epochs(20, 8, Piecewise.constant(3), 11)[1] == [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 10]
    # All of 8: 2 rows, 4 left. The tokens of an epoch are counted from its own start.
    assert epochs(20, 8, pieces((1, 3), (8, 8)), 12)[1] == [0, 0, 0, 0, 0, 5, 5, 5, 8, 8, 10, 10]


def test_epochs_are_the_same_in_whatever_order_they_are_asked_for():
    used = pieces((1, 2), (40, 5), (41, 1), (90, 8))
    asked = Epochs(3, 27, 8, used)
    late = asked.of(np.arange(500, 520))
    whole = Epochs(3, 27, 8, used).of(np.arange(520))
    assert [part.tolist() for part in late] == [part[500:].tolist() for part in whole]
    assert asked.of(np.arange(7))[1].tolist() == whole[1][:7].tolist()


def test_epochs_take_no_memory_each():
    # 100 tokens, samples of 8; with a token a row an epoch has 93 rows, as 93 > 100 - 8. 10**12 = 93 * whole + 4.
    whole, much = 10**12 // 93, 10**12
    asked = Epochs(12, 100, 8, pieces((1, 1), (much + 1, 8)))
    epoch, start = asked.of(much + np.array([-5, -4, 11, 12, 24]))
    # The epoch at the change has 4 rows of a token and 12 of 8, those after it 12 rows.
    assert epoch.tolist() == [whole - 1, whole, whole, whole + 1, whole + 2]
    assert (start - much).tolist() == [-97, -4, -4, 12, 24]


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """A corpus whose token at position p is p."""
    prefix = tmp_path_factory.mktemp("positions") / "corpus"
    with CorpusWriter(prefix, 1000) as writer:
        writer.add_document(np.arange(1000))
    return IndexedCorpus(prefix)


def test_leftovers_of_leftovers(positions):
    # 10 tokens to train on, two samples of 4: inputs 0-3 and 4-7; the rest are the inputs 8 and 9.
    stream = SampleStream(Samples([(positions, 0, 11)], 4, seed=3), Piecewise.constant(1))
    a, b = (4 * int(stream.sample(np.array([0]), np.array([number]))[0]) for number in (0, 1))
    # Rows 0, 1 use a and b. Left: 8 9, a+1 a+2 a+3, b+1 b+2 b+3. Row 2 is 8 9 a+1 a+2 and leaves the last three,
    # so the leftovers go on with 9 a+1 a+2; row 3 is a+3 b+1 b+2 b+3 and leaves b+1 b+2 b+3; row 4 is 9 a+1 a+2 b+1.
    inputs, targets = stream.read(np.arange(7), 1)
    assert inputs[:, 0].tolist() == [a, b, 8, a + 3, 9, b + 2, b + 1]
    assert np.array_equal(targets, inputs + 1)
    whole = stream.read(np.arange(2, 6), 4)[0].tolist()
    assert whole == [
        [8, 9, a + 1, a + 2],
        [a + 3, b + 1, b + 2, b + 3],
        [9, a + 1, a + 2, b + 1],
        [b + 2, b + 3, a + 1, a + 2],
    ]
    # 7 of 10 tokens are used, the 3 left fill no sample: row 7 begins the next epoch.
    epoch, number = stream.locate(np.arange(9))
    assert (epoch.tolist(), number.tolist()) == ([0] * 7 + [1] * 2, [0, 1, 2, 3, 4, 5, 6, 0, 1])


def test_the_rest_of_several_ranges_comes_first(positions):
    # Ranges of 5, 1 (nothing to train on), 3 and 6 tokens: rests of 0, 0, 2 and 1 tokens with samples of 4.
    ranges = [(positions, 0, 5), (positions, 50, 51), (positions, 100, 103), (positions, 200, 206)]
    stream = SampleStream(Samples(ranges, 4, seed=1), pieces((1, 3), (3, 4)))
    inputs, _ = stream.read(np.arange(3), 4)
    first, second = inputs[0, 3], inputs[1, 3]
    assert {first, second} == {3, 203}
    assert inputs[2].tolist() == [100, 101, 204, first]


def test_a_row_without_leftovers_has_no_place_among_them(positions):
    # Uses 2, 4, 4, 2 of 4 tokens: rows 0 and 3 leave two each.
    stream = SampleStream(Samples([(positions, 0, 17)], 4, seed=1), pieces((1, 2), (2, 4), (4, 2), (5, 4)))
    inputs, _ = stream.read(np.arange(5), 4)
    assert inputs[4].tolist() == [*inputs[0, 2:], *inputs[3, 2:]]
    assert stream.locate(np.arange(6))[0].tolist() == [0, 0, 0, 0, 0, 1]


def test_only_the_rows_asked_for_are_resolved(positions):
    stream = SampleStream(Samples([(positions, 0, 200)], 16, seed=1), pieces((1, 3), (30, 7), (60, 16)))
    whole = stream.read(np.arange(100), 16)
    for first in (0, 11, 12, 40, 59, 99):
        rows = np.arange(first, min(first + 9, 100))
        for part, all_rows in zip(stream.read(rows, 5), whole, strict=True):
            assert np.array_equal(part, all_rows[rows, :5])


def test_an_id_that_the_model_does_not_have_is_found_among_leftovers(positions):
    stream = SampleStream(Samples([(positions, 0, 17)], 4, seed=1, vocab_size=14), Piecewise.constant(1))
    targets = stream.read(np.arange(4), 1)[1]
    assert targets.max() == 13
    with pytest.raises(DataError, match=r"corpus: token 14 has id 14, outside the vocabulary of 14"):
        stream.read(np.array([4]), 1)  # row 4 is made of what the first rows left


def test_a_corpus_truncated_while_it_is_read_is_an_error(tmp_path):
    with CorpusWriter(tmp_path / "corpus", 1000) as writer:
        writer.add_document(np.arange(100))
    corpus = IndexedCorpus(tmp_path / "corpus")
    stream = SampleStream(Samples([(corpus, 0, 100)], 4, seed=1), Piecewise.constant(1))
    rows = np.arange(24, 30)
    assert stream.read(rows, 1)[0].shape == (6, 1)
    os.truncate(tmp_path / "corpus.bin", 20)
    for first in (0, 24):  # fresh rows, and rows made of leftovers
        with pytest.raises(DataError, match=r"corpus.bin: has 20 bytes, and had 200 when it was opened"):
            stream.read(rows - 24 + first, 1)
