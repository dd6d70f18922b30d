from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.samples import (
    _CHECK_BLOCK,
    Samples,
    _block_starts,
    check_token_ids,
    open_split,
    split_bounds,
)
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import ConfigError, DataError


def corpus(prefix: Path, lengths: list[int], vocab_size: int = 50257) -> IndexedCorpus:
    """Token at position p is p, so that the tokens read are their positions."""
    position = 0
    with CorpusWriter(prefix, vocab_size) as writer:
        for length in lengths:
            writer.add_document(np.arange(position, position + length))
            position += length
    return IndexedCorpus(prefix)


# Splits


@pytest.mark.parametrize(
    ("num_documents", "split", "bounds"),
    [
        (1000, "949,50,1", [0, 949, 999, 1000]),
        (100, "949,50,1", [0, 95, 100, 100]),
        (10, "949,50,1", [0, 10, 10, 10]),  # 9.49 -> 9, 0.5 -> 0, 0.01 -> 0: one short, shifted by 1
        (30, "949,50,1", [0, 28, 30, 30]),  # 28.47 -> 28, 1.5 -> 2, 0.03 -> 0
        (1, "949,50,1", [0, 1, 1, 1]),
        (2, "1,1,1", [0, 0, 1, 2]),  # 0.67 -> 1 each: one over, shifted by -1
        (3, "0,1,1", [0, 0, 1, 3]),  # 1.5 -> 2 each: one over; Megatron has -1 where we have 0
        (7, "100", [0, 7, 7, 7]),
        (7, "50,50", [0, 3, 7, 7]),  # 3.5 -> 4 each (half to even): one over
        (10, "0.5, .25, .25", [0, 6, 8, 10]),  # 5, 2.5 -> 2, 2: one short
        (10, "80/10/10", [0, 8, 9, 10]),
        (10, "0,0,1", [0, 0, 0, 10]),
    ],
)
def test_split_bounds_by_hand(num_documents: int, split: str, bounds: list[int]) -> None:
    assert split_bounds(num_documents, split) == bounds


@settings(deadline=None)
@given(st.integers(1, 10**7), st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any))
def test_splits_part_all_documents(num_documents: int, weights: list[int]) -> None:
    bounds = split_bounds(num_documents, ",".join(map(str, weights)))
    assert len(bounds) == 4
    assert (bounds[0], bounds[3]) == (0, num_documents)
    assert bounds == sorted(bounds)
    for number, weight in enumerate(weights):  # each share is off by rounding and shift only
        assert abs(bounds[number + 1] - bounds[number] - num_documents * weight / sum(weights)) <= 2.01


@pytest.mark.parametrize("split", ["", "a,b,c", "0,0,0", "-1,2,0", "1,2,3,4", "1;2", "nan,1,1", "inf", "1e3,1", "1,,1"])
def test_invalid_split(split: str) -> None:
    with pytest.raises(ConfigError, match=r'split: ".*" is not valid: .*such as "949,50,1"'):
        split_bounds(100, split)


# Samples


def test_samples_by_hand(tmp_path: Path) -> None:
    # 33 tokens, L = 8: (33 - 1) // 8 = 4 samples; with 32 tokens the last target is missing: 3.
    samples = Samples([(corpus(tmp_path / "c", [33]), 0, 33)], 8, seed=1)
    assert samples.num_samples == 4
    assert samples.read([0, 3], 8).tolist() == [list(range(9)), list(range(24, 33))]
    assert Samples([(IndexedCorpus(tmp_path / "c"), 0, 32)], 8, seed=1).num_samples == 3
    assert Samples([(IndexedCorpus(tmp_path / "c"), 0, 9)], 8, seed=1).num_samples == 1


@pytest.mark.parametrize("seqlen", [1, 5, 8])
def test_a_short_read_is_the_prefix_of_the_full_one(tmp_path: Path, seqlen: int) -> None:
    samples = Samples([(corpus(tmp_path / "c", [100]), 10, 100)], 8, seed=1)
    ids = np.array([10, 0, 3, 3])
    assert np.array_equal(samples.read(ids, seqlen), samples.read(ids, 8)[:, : seqlen + 1])


@pytest.mark.parametrize("seqlen", [0, 9])
def test_seqlen_outside_the_sample(tmp_path: Path, seqlen: int) -> None:
    samples = Samples([(corpus(tmp_path / "c", [100]), 0, 100)], 8, seed=1)
    with pytest.raises(ConfigError, match=f"seqlen: {seqlen} is outside 1..8"):
        samples.read([0], seqlen)


def test_several_corpora_lie_end_to_end(tmp_path: Path) -> None:
    first, second = corpus(tmp_path / "a", [33]), corpus(tmp_path / "b", [1000, 20])
    # (33 - 1 - 1) // 8 = 3 samples at 1, 9, 17; then 6 tokens give none; then (20 - 1) // 8 = 2 at 1000, 1008.
    samples = Samples([(first, 1, 33), (second, 3, 9), (second, 1000, 1020)], 8, seed=1)
    assert samples.num_samples == 5
    where, positions = samples.locate([4, 0, 2, 3])
    assert where.tolist() == [2, 0, 0, 2]
    assert positions.tolist() == [1008, 1, 17, 1000]
    assert samples.read([4, 0, 2, 3], 2).tolist() == [[1008, 1009, 1010], [1, 2, 3], [17, 18, 19], [1000, 1001, 1002]]
    for outside in (-1, 5):
        with pytest.raises(IndexError, match=r"outside 0\.\.4"):
            samples.locate([outside])


def test_no_sample_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sample .*small has 8 tokens, .* seq_length \+ 1 = 9; prepare more text"):
        Samples([(corpus(tmp_path / "small", [20]), 0, 8)], 8, seed=1)


def test_misuse(tmp_path: Path) -> None:
    whole = corpus(tmp_path / "c", [20])
    with pytest.raises(ConfigError, match="seq_length: 0 is not valid"):
        Samples([(whole, 0, 20)], 0, seed=1)
    with pytest.raises(ConfigError, match="no corpus given"):
        Samples([], 8, seed=1)
    with pytest.raises(IndexError, match=r"tokens 0\.\.21 are outside its 20"):
        Samples([(whole, 0, 21)], 8, seed=1)


def test_open_split_parts_documents(tmp_path: Path) -> None:
    corpus(tmp_path / "a", [10] * 10)
    corpus(tmp_path / "b", [100] * 10)
    prefixes = [str(tmp_path / "a"), str(tmp_path / "b")]
    ranges = {
        which: open_split(prefixes, "80,10,10", which, 4, seed=1).ranges  # documents 0-7, 8, 9
        for which in ("train", "valid", "test")
    }
    assert [r[1:] for r in ranges["train"]] == [(0, 80), (0, 800)]
    assert [r[1:] for r in ranges["valid"]] == [(80, 90), (800, 900)]
    assert [r[1:] for r in ranges["test"]] == [(90, 100), (900, 1000)]
    assert open_split(prefixes, "80,10,10", "test", 4, seed=1).num_samples == 2 + 24


def test_open_split_reports_what_is_wrong(tmp_path: Path) -> None:
    corpus(tmp_path / "a", [100] * 4)
    with pytest.raises(DataError, match=r"a has 0 tokens, .*give this split a larger share"):
        open_split([tmp_path / "a"], "1,0,0", "valid", 8, seed=1)
    with pytest.raises(ConfigError, match="there is no 'validation'; valid names: train, valid, test"):
        open_split([tmp_path / "a"], "1,0,0", "validation", 8, seed=1)
    with pytest.raises(DataError, match="missing: no corpus here"):
        open_split([tmp_path / "missing"], "1,0,0", "train", 8, seed=1)


# Token ids


def test_read_finds_an_id_the_model_does_not_have(tmp_path: Path) -> None:
    whole = corpus(tmp_path / "c", [100])
    assert Samples([(whole, 0, 100)], 8, 1, vocab_size=97).read([11], 8).max() == 96
    with pytest.raises(DataError, match=r"c: token 96 has id 96, outside the vocabulary of 96; set the model's vocab"):
        Samples([(whole, 0, 100)], 8, 1, vocab_size=96).read([0, 11], 8)
    assert Samples([(whole, 0, 100)], 8, 1, vocab_size=96).read([0, 11], 7).max() == 95


def _raw(path: Path, tokens: np.ndarray) -> IndexedCorpus:
    """A corpus of any tokens; the writer's own check would stop bad ones."""
    with CorpusWriter(path, 100_000) as writer:
        writer.add_document(np.zeros(len(tokens), dtype=np.int64))
    path.with_suffix(".bin").write_bytes(tokens.astype("<i4").tobytes())
    return IndexedCorpus(path)


@pytest.mark.parametrize("bad", [-1, 50, 99_999])
@pytest.mark.parametrize("position", [0, 65_535, 65_536, 149_999])
def test_every_token_of_a_small_corpus_is_checked(tmp_path: Path, position: int, bad: int) -> None:
    tokens = np.full(150_000, 49)
    check_token_ids(_raw(tmp_path / "good", tokens), 50)
    tokens[position] = bad
    damaged = _raw(tmp_path / "bad", tokens)
    with pytest.raises(DataError, match=f"bad: token {position} has id {bad}, outside the vocabulary of 50"):
        check_token_ids(damaged, 50)
    with pytest.raises(DataError, match=f"token {position} has id {bad}"):
        Samples([(damaged, 0, 150_000)], 1, 1, vocab_size=50).read([min(position, 149_998)], 1)


@pytest.mark.parametrize("num_tokens", [1, 65_536, 65_537, 2**24 - 1, 2**24])
def test_blocks_cover_a_corpus_of_up_to_16_mi_tokens(tmp_path: Path, num_tokens: int) -> None:
    starts = _block_starts(num_tokens)
    assert starts[0] == 0
    assert starts[-1] + _CHECK_BLOCK >= num_tokens
    assert all(after - before <= _CHECK_BLOCK for before, after in pairwise(starts))


def test_a_large_corpus_is_checked_in_parts_with_both_ends() -> None:
    starts = _block_starts(10**12)
    assert len(starts) * _CHECK_BLOCK == 2**24
    assert (starts[0], starts[-1]) == (0, 10**12 - _CHECK_BLOCK)
