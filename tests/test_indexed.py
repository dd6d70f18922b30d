import mmap
import os
import pickle
import struct
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlen_curriculum.data.indexed import HEADER, MAGIC, IndexedCorpus, corpus_prefix
from seqlen_curriculum.data.writer import CorpusWriter, token_dtype
from seqlen_curriculum.errors import DataError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0]]  # starts 0, 4, 6; 11 tokens
STREAM = [token for document in DOCUMENTS for token in document]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 100) -> str:
    with CorpusWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(tmp_path / "corpus")


def test_stream_and_documents(prefix: str) -> None:
    corpus = IndexedCorpus(prefix)
    assert (corpus.prefix, corpus.dtype, corpus.vocab_size) == (prefix, np.uint16, None)
    assert (corpus.num_tokens, corpus.num_documents) == (11, 3)
    assert corpus.tokens.tolist() == STREAM
    assert [corpus.document_start(document) for document in range(4)] == [0, 4, 6, 11]
    for outside in (-1, 4):
        with pytest.raises(IndexError, match=f"no document {outside}, it has 3"):
            corpus.document_start(outside)


def test_gather_at_first_last_and_past_last(prefix: str) -> None:
    corpus = IndexedCorpus(prefix)
    rows = corpus.gather([0, 3, 8], 3)
    assert rows.tolist() == [[5, 6, 7], [0, 8, 0], [11, 12, 0]]
    assert rows.dtype == np.uint16  # as stored
    assert corpus.gather([0], 11).tolist() == [STREAM]
    assert corpus.gather([10], 1).tolist() == [[0]]
    assert corpus.gather([], 5).shape == (0, 5)
    for starts, length in (([9], 3), ([-1], 3), ([0], 12), ([0], 0)):
        with pytest.raises(IndexError, match="outside its 11 tokens"):
            corpus.gather(starts, length)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=20), st.integers(1, 100))
def test_gather_equals_slicing(tmp_path_factory: pytest.TempPathFactory, starts: list[int], length: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 70_000, 1000)
    folder = tmp_path_factory.getbasetemp()
    path = folder / "slices"
    if not (folder / "slices.idx").exists():
        write(path, [tokens.tolist()], 70_000)
    expected = [tokens[start : start + length].tolist() for start in starts]
    assert IndexedCorpus(path).gather(starts, length).tolist() == expected


def test_a_caller_may_change_what_it_got(prefix: str) -> None:
    corpus = IndexedCorpus(prefix)
    corpus.gather([0], 3)[:] = 99
    assert corpus.gather([0], 3).tolist() == [[5, 6, 7]]


def test_another_process_opens_the_files_again(prefix: str) -> None:
    pickled = pickle.dumps(IndexedCorpus(prefix))
    assert len(pickled) < 300
    assert pickle.loads(pickled).gather([4], 2).tolist() == [[8, 0]]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_either_file_names_the_pair(prefix: str, suffix: str) -> None:
    assert IndexedCorpus(prefix + suffix).prefix == prefix
    assert corpus_prefix(Path(prefix + suffix)) == prefix


def test_the_record_beside_gives_the_vocabulary(prefix: str) -> None:
    record = Path(prefix + ".json")
    for content, expected in (('{"vocab_size": 100}', 100), ('{"documents": 3}', None), ("[]", None)):
        record.write_text(content)
        assert IndexedCorpus(prefix).vocab_size == expected
    for content, problem in (("{", "not valid JSON"), ('{"vocab_size": "big"}', "vocab_size is 'big'")):
        record.write_text(content)
        with pytest.raises(DataError, match=f"corpus.json: {problem}"):
            IndexedCorpus(prefix)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_megatrons_rule_for_the_dtype(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype
    last = vocab_size - 1
    corpus = IndexedCorpus(write(tmp_path / "c", [[0, last]], vocab_size))
    assert corpus.dtype == dtype
    assert corpus.gather([0], 2).tolist() == [[0, last]]


def test_other_integer_types_are_read(tmp_path: Path) -> None:
    for code, dtype in {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items():
        path = tmp_path / f"c{code}"
        tokens = np.array([1, 2, 3], dtype=dtype)
        path.with_suffix(".bin").write_bytes(tokens.tobytes())
        blocks = struct.pack("<iqqq", 3, 0, 0, 1)
        path.with_suffix(".idx").write_bytes(HEADER.pack(MAGIC, 1, code, 1, 2) + blocks)
        assert IndexedCorpus(path).gather([1], 2).tolist() == [[2, 3]]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    # Megatron's sentence-split corpora: 4 sequences of 2, 1, 3, 1 tokens, documents of sequences 0-1 and 2-3.
    path = tmp_path / "sentences"
    path.with_suffix(".bin").write_bytes(np.arange(7, dtype="<u2").tobytes())
    blocks = struct.pack("<4i4q3q", 2, 1, 3, 1, 0, 4, 6, 12, 0, 2, 4)
    path.with_suffix(".idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 4, 3) + blocks)
    corpus = IndexedCorpus(path)
    assert [corpus.document_start(document) for document in range(3)] == [0, 3, 7]


# Damaged and missing files


def _edit(path: str, position: int, content: bytes) -> None:
    data = bytearray(Path(path).read_bytes())
    data[position : position + len(content)] = content
    Path(path).write_bytes(data)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_one_file_missing_says_which(prefix: str, missing: str) -> None:
    Path(prefix + missing).unlink()
    with pytest.raises(DataError, match=f"corpus{missing}: missing, though the other file .* prepare both again"):
        IndexedCorpus(prefix)


def test_both_files_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: no corpus here, neither .*nothing.bin nor .*slw prepare"):
        IndexedCorpus(tmp_path / "nothing")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_that_can_not_be_read(prefix: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Any, *args: Any) -> Any:  # as for another user's file; root may read it
        if str(path) == prefix + suffix:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args)

    for module in ("indexed", "corpus_index"):
        monkeypatch.setattr(f"seqlen_curriculum.data.{module}.open", closed, raising=False)
    with pytest.raises(DataError, match=rf"corpus{suffix}: can't be read \(Permission denied\); check its owner"):
        IndexedCorpus(prefix)


# 3 documents: header 34 bytes, lengths 34..46, offsets 46..70, document indices 70..102.
@pytest.mark.parametrize(
    ("position", "content", "problem"),
    [
        (0, b"PARQUET", "starts with b'PARQUET.*is not an MMIDIDX index"),
        (9, struct.pack("<Q", 2), "MMIDIDX version 2, only version 1"),
        (17, b"\x07", "dtype code 7, integers are 1, 2, 3, 4, 5, 8"),
        (17, b"\x63", "dtype code 99"),
        (18, struct.pack("<Q", 4), r"has 102 bytes where .*\(4 sequences, 4 document indices\) needs 114"),
        (26, struct.pack("<Q", 2**63), "has 102 bytes where its header"),
        (46, struct.pack("<q", 2), "first byte offset is 2, not 0"),
        (70, struct.pack("<q", 1), "document indices run from 1 to 3, not from 0 to 3"),
        (94, struct.pack("<q", 2), "document indices run from 0 to 2, not from 0 to 3"),
    ],
)
def test_damaged_index(prefix: str, position: int, content: bytes, problem: str) -> None:
    _edit(prefix + ".idx", position, content)
    with pytest.raises(DataError, match=rf"corpus\.idx: .*{problem}.* prepare (it|the text) again"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("kept", [0, 33, 34, 101])
def test_truncated_index(prefix: str, kept: int) -> None:
    Path(prefix + ".idx").write_bytes(Path(prefix + ".idx").read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"corpus\.idx: .*{kept} bytes"):
        IndexedCorpus(prefix)


def test_too_long_index(prefix: str) -> None:
    with open(prefix + ".idx", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DataError, match=r"has 103 bytes where its header .* needs 102"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("size", [0, 20, 21, 23])
def test_tokens_of_another_size(prefix: str, size: int) -> None:
    Path(prefix + ".bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"corpus\.bin: has {size} bytes where .*corpus\.idx says 22"):
        IndexedCorpus(prefix)


# Lengths 4, 2, 5 of uint16: offsets 0, 8, 12 and document indices 0, 1, 2, 3.
@pytest.mark.parametrize(
    ("position", "content", "problem"),
    [
        (54, struct.pack("<q", 7), "sequence 1 starts at byte 7 of the .bin, and sequence 0 ends at byte 8"),
        (46, struct.pack("<qqq", 0, 12, 12), "sequence 1 starts at byte 12 .* sequence 0 ends at byte 8"),
        (34, struct.pack("<iii", 4, 3, 5), "sequence 2 starts at byte 12 .* sequence 1 ends at byte 14"),
        (34, struct.pack("<iiiqqq", 4, -2, 5, 0, 8, 12), "sequence 1 has -2 tokens"),
        (78, struct.pack("<q", -1), "document 1 starts at sequence -1, before document 0 at 0"),
        (78, struct.pack("<q", 3), "document 2 starts at sequence 2, before document 1 at 3"),
    ],
)
def test_an_index_in_another_order_than_its_tokens(prefix: str, position: int, content: bytes, problem: str) -> None:
    _edit(prefix + ".idx", position, content)
    with pytest.raises(DataError, match=rf"corpus\.idx: .*{problem}.*prepare (it|the text) again"):
        IndexedCorpus(prefix)


def test_an_error_past_the_first_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqlen_curriculum.data.corpus_index._BLOCK", 4)
    prefix = write(tmp_path / "c", [[1, 2]] * 21)  # header 34, lengths 34..118, offsets 118..286, documents 286..462
    assert IndexedCorpus(prefix).num_documents == 21
    for number in range(1, 20):
        good = Path(prefix + ".idx").read_bytes()
        _edit(prefix + ".idx", 118 + 8 * number, struct.pack("<q", 4 * number + 2))
        with pytest.raises(DataError, match=f"sequence {number} starts at byte {4 * number + 2} "):
            IndexedCorpus(prefix)
        Path(prefix + ".idx").write_bytes(good)
        _edit(prefix + ".idx", 286 + 8 * number, struct.pack("<q", number + 1))
        with pytest.raises(DataError, match=f"document {number} starts at sequence {number + 1}, and every other one"):
            IndexedCorpus(prefix)
        _edit(prefix + ".idx", 286 + 8 * number, struct.pack("<q", number - 2))
        with pytest.raises(DataError, match=f"document {number} starts at sequence {number - 2}, before"):
            IndexedCorpus(prefix)
        Path(prefix + ".idx").write_bytes(good)


def test_a_file_is_checked_once_unless_it_changes(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(prefix + ".idx", (1e9, 1e9))
    IndexedCorpus(prefix)
    with monkeypatch.context() as patch:
        patch.setattr(
            "seqlen_curriculum.data.corpus_index.CorpusIndex._check_sequences", lambda _: pytest.fail("again")
        )
        assert IndexedCorpus(prefix).num_documents == 3
    _edit(prefix + ".idx", 54, struct.pack("<q", 7))
    with pytest.raises(DataError, match="sequence 1 starts at byte 7"):
        IndexedCorpus(prefix)


def test_a_file_truncated_while_it_is_open_ends_in_words(long_corpus: IndexedCorpus) -> None:
    os.truncate(long_corpus.prefix + ".bin", 6_000)
    for read in (
        lambda: long_corpus.gather([9_000], 10),
        lambda: long_corpus.block(0, 50),
        long_corpus.fingerprint,
    ):
        with pytest.raises(DataError, match=r"long.bin: has 6000 bytes, and had 20000 when it was opened"):
            read()


@pytest.mark.parametrize("documents", [[], [[]]])
def test_empty_corpus(tmp_path: Path, documents: list[list[int]]) -> None:
    with pytest.raises(DataError, match="the corpus is empty"):
        IndexedCorpus(write(tmp_path / "c", documents))


# Writing


def test_documents_in_pieces_equal_documents_at_once(prefix: str, tmp_path: Path) -> None:
    tokens = STREAM
    with CorpusWriter(tmp_path / "pieces", 100) as writer:
        writer.add_tokens(tokens[:3], [])
        writer.add_tokens(tokens[3:7], [1, 3])
        writer.add_tokens([], [])
        writer.add_tokens(np.array(tokens[7:]), np.array([4]))
        assert (writer.num_tokens, writer.num_documents) == (11, 3)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"pieces{suffix}").read_bytes() == Path(prefix + suffix).read_bytes()


def test_an_exception_leaves_the_older_corpus(prefix: str, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="token id 100"), CorpusWriter(prefix, 100) as writer:
        _fail_in_the_middle(writer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _fail_in_the_middle(writer: CorpusWriter) -> None:
    writer.add_document([1, 2])
    writer.add_file(".json", b"{}")
    writer.add_document([100])


def test_a_finished_corpus_replaces_the_older_one(prefix: str, tmp_path: Path) -> None:
    with CorpusWriter(prefix, 100) as writer:
        writer.add_document([1, 2])
        writer.add_file(".json", b'{"vocab_size": 100}')
        assert IndexedCorpus(prefix).num_tokens == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]
    corpus = IndexedCorpus(prefix)
    assert (corpus.num_tokens, corpus.vocab_size) == (2, 100)


@pytest.mark.parametrize(("tokens", "worst"), [([0, 100], 100), ([-1, 5], -1), ([70_000], 70_000)])
def test_a_token_outside_the_vocabulary(tmp_path: Path, tokens: list[int], worst: int) -> None:
    with pytest.raises(DataError, match=f"token id {worst} is outside the vocabulary of 100"):
        write(tmp_path / "c", [tokens])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "ends"), [([1, 2], [1]), ([1, 2], [3]), ([1, 2], [2, 1]), ([[1]], [1]), ([1.5], [1])]
)
def test_misuse_writes_nothing(tmp_path: Path, tokens: Any, ends: list[int]) -> None:
    with (
        pytest.raises(ValueError, match=r"unfinished|ascend|one row of integers"),
        CorpusWriter(tmp_path / "c", 9) as w,
    ):
        w.add_tokens(tokens, ends)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write here"):
        write(tmp_path / "file" / "corpus")


# megatron-core


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


def _documents(vocab_size: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    documents = [random.integers(0, vocab_size, n) for n in (1, 5, 0, 1000, 3)]
    return [*documents, np.array([0, vocab_size - 1])]


@pytest.mark.parametrize("way", ["add_document", "add_item"])
@pytest.mark.parametrize("vocab_size", [50257, 65499, 65500, 200_000])
def test_the_same_bytes_as_megatron_both_ways(tmp_path: Path, megatron: Any, vocab_size: int, way: str) -> None:
    documents = _documents(vocab_size)
    written, by_megatron = str(tmp_path / "written"), str(tmp_path / "by_megatron")
    write(Path(written), documents, vocab_size)
    _write_with_megatron(megatron, by_megatron, documents, vocab_size, way)
    for suffix in (".bin", ".idx"):
        assert Path(written + suffix).read_bytes() == Path(by_megatron + suffix).read_bytes()
    assert [document.tolist() for document in megatron.IndexedDataset(written)] == [d.tolist() for d in documents]
    corpus = IndexedCorpus(by_megatron)
    assert corpus.tokens.tolist() == np.concatenate(documents).tolist()
    assert corpus.document_start(4) == 1006


def _write_with_megatron(megatron: Any, prefix: str, documents: list[np.ndarray], vocab_size: int, way: str) -> None:
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(prefix + ".bin", megatron.DType.optimal_dtype(vocab_size))
    for document in documents:
        if way == "add_document":
            builder.add_document(document, [len(document)])
        else:
            builder.add_item(torch.from_numpy(document))
            builder.end_document()
    builder.finalize(prefix + ".idx")


def _outcome(megatron: Any, prefix: str) -> str:
    """Return what opening the pair gives: an error of this package, or the very documents that megatron-core reads."""
    try:
        corpus = IndexedCorpus(prefix)
    except DataError:
        return "refused"
    theirs = megatron.IndexedDataset(prefix, mmap=False)
    expected = [theirs[number].astype(np.int64).tolist() for number in range(len(theirs))]
    assert corpus.tokens.tolist() == [token for sequence in expected for token in sequence]
    starts = [0, *np.cumsum([len(sequence) for sequence in expected]).tolist()]
    documents = corpus.document_starts(0, corpus.num_documents).tolist()
    assert documents == [starts[number] for number in theirs.document_indices.tolist()]
    return "read"


def _flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def _index_flips(tmp_path: Path, megatron: Any, bits: range) -> int:
    """Return how many flips of one bit of an index of 40 documents are read, in every case as megatron-core reads them."""
    random = np.random.default_rng(3)
    prefix = write(
        tmp_path / "flips", [random.integers(0, 30_000, n).tolist() for n in random.integers(0, 9, 40)], 40_000
    )
    good, documents = Path(prefix + ".idx").read_bytes(), IndexedCorpus(prefix).document_starts(0, 40).tolist()
    read = 0
    for bit in bits:
        if bit < 8 * len(good):
            Path(prefix + ".idx").write_bytes(_flip(good, bit))
            if _outcome(megatron, prefix) == "read":
                assert IndexedCorpus(prefix).document_starts(0, 40).tolist() == documents
                read += 1
    return read


def test_a_bit_that_flips_in_an_index_never_gives_another_split(tmp_path: Path, megatron: Any) -> None:
    assert _index_flips(tmp_path, megatron, range(0, 7000, 13)) == 0


@pytest.mark.slow
def test_no_bit_that_flips_in_an_index_gives_another_split(tmp_path: Path, megatron: Any) -> None:
    assert _index_flips(tmp_path, megatron, range(7000)) == 0


def _random_index(tmp_path: Path, random: np.random.Generator) -> str:
    """Write a pair whose index may leave sequences out, repeat or swap them, and name documents in any order."""
    lengths = random.integers(0, 4, random.integers(1, 6))
    itemsize, code = ((1, 1), (2, 8), (4, 4))[random.integers(3)]
    offsets = np.cumsum(np.append(0, lengths[:-1])) * itemsize
    order = np.arange(len(lengths))
    if random.random() < 0.6:
        order = random.choice(order, random.integers(1, len(order) + 2))
    documents = np.sort(random.integers(0, len(order) + 1, random.integers(0, 4)))
    if random.random() < 0.2:
        documents = random.permutation(documents)
    documents = np.concatenate(([0], documents, [len(order)]))
    prefix = tmp_path / "random"
    prefix.with_suffix(".bin").write_bytes(random.integers(0, 256, lengths.sum() * itemsize, np.uint8).tobytes())
    blocks = (
        lengths[order].astype("<i4").tobytes()
        + offsets[order].astype("<i8").tobytes()
        + documents.astype("<i8").tobytes()
    )
    prefix.with_suffix(".idx").write_bytes(HEADER.pack(MAGIC, 1, code, len(order), len(documents)) + blocks)
    return str(prefix)


def _random_indices(tmp_path: Path, megatron: Any, count: int) -> Counter[str]:
    random = np.random.default_rng(4)
    return Counter(_outcome(megatron, _random_index(tmp_path, random)) for _ in range(count))


def test_an_index_is_read_as_megatron_does_or_refused(tmp_path: Path, megatron: Any) -> None:
    outcomes = _random_indices(tmp_path, megatron, 200)
    assert min(outcomes["read"], outcomes["refused"]) > 40


@pytest.mark.slow
def test_indices_and_tokens_of_many_kinds_are_read_as_megatron_does_or_refused(tmp_path: Path, megatron: Any) -> None:
    outcomes = _random_indices(tmp_path, megatron, 20_000)
    assert min(outcomes["read"], outcomes["refused"]) > 4000


@pytest.mark.parametrize("code", range(16))
def test_another_byte_of_the_dtype(prefix: str, megatron: Any, code: int) -> None:
    _edit(prefix + ".idx", 17, bytes([code]))  # 8 is uint16; 3 is int16, with the same tokens below 32,768
    assert _outcome(megatron, prefix) == ("read" if code in (3, 8) else "refused")


def test_fingerprint_follows_the_content_not_the_path(tmp_path: Path) -> None:
    def written(name: str, documents: list[list[int]]) -> str:
        with CorpusWriter(tmp_path / name, vocab_size=300) as writer:
            for document in documents:
                writer.add_document(document)
        return IndexedCorpus(tmp_path / name).fingerprint()

    first = written("a", [[1, 2, 3], [4]])
    assert written("b", [[1, 2, 3], [4]]) == first
    assert written("c", [[1, 2], [3, 4]]) == first  # the same stream in as many documents
    assert written("d", [[1, 2, 3, 4]]) != first
    assert written("e", [[1, 2, 3], [5]]) != first


class RecordedMap:
    """A memory map of ``size`` bytes that notes what is to be read ahead."""

    def __init__(self, size: int) -> None:
        self._size, self.advised = size, list[tuple[int, int]]()

    def __len__(self) -> int:
        return self._size

    def size(self) -> int:
        return self._size

    def madvise(self, advice: int, start: int, length: int) -> None:
        assert advice == mmap.MADV_WILLNEED
        self.advised.append((start, length))


@pytest.fixture
def long_corpus(tmp_path: Path) -> IndexedCorpus:
    """10,000 tokens, 20,000 bytes: 4 pages of 4,096 and a part of a fifth."""
    return IndexedCorpus(write(tmp_path / "long", [[*range(1, 100), 0]] * 100))


@pytest.mark.parametrize(("faults", "reads_ahead"), [((7, 7), False), ((7, 8), True)])
def test_rows_are_read_ahead_where_the_first_of_them_lie_on_the_disk(
    long_corpus: IndexedCorpus, monkeypatch: pytest.MonkeyPatch, faults: tuple[int, int], reads_ahead: bool
) -> None:
    counts = iter(faults)
    monkeypatch.setattr("seqlen_curriculum.data.indexed._faults_from_disk", lambda: next(counts))
    pages = RecordedMap(20_000)
    long_corpus._map = pages  # type: ignore[assignment]
    starts = [*range(0, 9990, 370)]  # 27 of them
    assert long_corpus.gather(starts, 10).tolist() == [long_corpus.tokens[at : at + 10].tolist() for at in starts]
    assert bool(pages.advised) == reads_ahead
    page = mmap.PAGESIZE
    expected = [(2 * at // page * page, 2 * at + 20 - 2 * at // page * page) for at in starts]
    assert pages.advised == (expected if reads_ahead else [])


def test_few_rows_are_not_probed(long_corpus: IndexedCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqlen_curriculum.data.indexed._faults_from_disk", lambda: pytest.fail("probed"))
    assert long_corpus.gather([*range(16)], 2)[15].tolist() == [16, 17]


def test_a_block_is_read_in_one_piece_and_ends_with_the_corpus(long_corpus: IndexedCorpus) -> None:
    pages = RecordedMap(20_000)
    long_corpus._map = pages  # type: ignore[assignment]
    assert long_corpus.block(9_990, 50).tolist() == [*range(91, 100), 0]
    start = 19_980 // mmap.PAGESIZE * mmap.PAGESIZE
    assert pages.advised == [(start, 20_000 - start)]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="mapped files are listed in /proc/self/smaps")
def test_the_system_reads_nothing_around_a_row(long_corpus: IndexedCorpus) -> None:
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags:")
    (flags,) = (after.split("\n")[0] for before, after in pairwise(blocks) if "long.bin" in before)
    assert "rr" in flags.split()  # random read advised
