"""The index of pieces: its numbers by hand, its file, and the file of another corpus."""

import shutil

import numpy as np
import pytest

from seqlen_curriculum.data import piece_index
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.piece_index import PieceIndex
from seqlen_curriculum.data.pieces import Pieces
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import DataError


def write(prefix, lengths, end=0, token=1):
    with CorpusWriter(prefix, 100) as writer:
        for length in lengths:
            writer.add_document(np.array([token] * (length - 1) + [end] * min(length, 1)))
    return IndexedCorpus(prefix)


def test_documents_are_cut_by_the_binary_form_of_their_lengths(tmp_path):
    # Targets: 21 (22 without the first token of the corpus) = 8 + 8 + 4 + 1, none, 8, 7 = 4 + 2 + 1.
    corpus = write(tmp_path / "c", [22, 0, 8, 7])
    index = PieceIndex(corpus, 8)
    assert index.before(4).tolist() == [2, 1, 2, 3]  # of 1, 2, 4 and 8 tokens
    assert index.before(2).tolist() == [1, 0, 1, 2]
    assert index.locate(3, np.array([0, 1, 2])).tolist() == [1, 9, 22]
    assert index.locate(2, np.array([1, 0])).tolist() == [30, 17]
    assert index.locate(1, np.array([0])).tolist() == [34]
    assert index.locate(0, np.array([0, 1])).tolist() == [21, 36]


def test_pieces_of_a_split_are_those_of_its_documents(tmp_path):
    corpus = write(tmp_path / "c", [22, 0, 8, 7])
    pieces = Pieces([(corpus, 2, 4)], (2, 4, 8), seed=1)
    assert (pieces.counts.tolist(), pieces.num_tokens, pieces.dropped_tokens) == ([1, 1, 1], 14, 1)
    assert [start.tolist() for start in pieces.locate(2, np.array([0]))] == [[0], [21]]  # from the end token before it
    with pytest.raises(IndexError, match=r"pieces 1..1 are outside 0..0"):
        pieces.locate(0, np.array([1]))


def test_blocks_of_documents_are_counted_in_chunks(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(0, 40, 1000).tolist()
    corpus = write(tmp_path / "c", lengths)
    whole = np.load(f"{PieceIndex(corpus, 16).corpus.prefix}.pieces16.npy")
    monkeypatch.setattr(piece_index, "_CHUNK", 3)
    assert np.array_equal(piece_index._count(corpus, 16).ravel(), whole[2:])
    for power in range(5):
        count = int(PieceIndex(corpus, 16).before(1000)[power])
        starts = PieceIndex(corpus, 16).locate(power, np.arange(count))
        assert (np.diff(starts) >= 1 << power).all()


def test_sequences_of_a_document_are_one_document(tmp_path):
    corpus = write(tmp_path / "c", [3, 4, 0, 9, 2])
    documents = np.array([0, 2, 2, 5], "<i8")  # documents of 7, 0 and 11 tokens
    path = tmp_path / "c.idx"
    content = bytearray(path.read_bytes()[: -8 * 6] + documents.tobytes())
    content[26:34] = len(documents).to_bytes(8, "little")
    path.write_bytes(content)
    corpus = IndexedCorpus(tmp_path / "c")
    assert PieceIndex(corpus, 8).before(3).tolist() == [1, 2, 1, 1]  # 6 = 4 + 2, 11 = 8 + 2 + 1


def test_the_file_is_made_once_and_mapped(tmp_path, monkeypatch):
    corpus = write(tmp_path / "c", [22, 0, 8, 7])
    PieceIndex(corpus, 8)
    monkeypatch.setattr(piece_index, "_count", lambda *_: pytest.fail("counted again"))
    assert PieceIndex(IndexedCorpus(tmp_path / "c"), 8).before(4).tolist() == [2, 1, 2, 3]
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert PieceIndex(IndexedCorpus(tmp_path / "moved" / "c"), 8).before(4).tolist() == [2, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.glob("c.*")) == ["c.bin", "c.idx", "c.pieces8.npy"]


@pytest.mark.parametrize("damage", ["other documents", "truncated", "garbage"])
def test_the_file_of_another_corpus_is_made_again(tmp_path, capsys, damage):
    piece_index._say.cache_clear()
    path = tmp_path / "c.pieces8.npy"
    PieceIndex(write(tmp_path / "c", [22, 0, 8, 7]), 8)
    if damage == "other documents":  # of as many documents and tokens
        corpus = write(tmp_path / "c", [20, 2, 8, 7])
    else:
        path.write_bytes(path.read_bytes()[:-8] if damage == "truncated" else b"no array")
        corpus = IndexedCorpus(tmp_path / "c")
    expected = [2, 3, 1, 3] if damage == "other documents" else [2, 1, 2, 3]
    capsys.readouterr()
    assert PieceIndex(corpus, 8).before(4).tolist() == expected
    assert f"{path}: is not the index of this corpus; it is made again" in capsys.readouterr().err
    PieceIndex(corpus, 8)
    assert capsys.readouterr().err == ""


def test_a_corpus_that_changed_while_it_is_read_is_an_error(tmp_path):
    index = PieceIndex(write(tmp_path / "c", [22, 0, 8, 7]), 8)
    index.corpus = write(tmp_path / "d", [20, 2, 8, 7])
    with pytest.raises(DataError, match=r"c.pieces8.npy|d.pieces8.npy.*delete this file"):
        index.locate(2, np.array([0]))


def test_without_a_place_beside_the_corpus_the_index_is_in_the_cache(tmp_path, monkeypatch):
    def occupy(folder):
        (folder / "c.pieces8.npy").mkdir()

    assert_indexed_elsewhere(tmp_path, monkeypatch, occupy)


def assert_indexed_elsewhere(tmp_path, monkeypatch, close):
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpus = write(folder / "c", [22, 0, 8, 7])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    close(folder)
    assert PieceIndex(corpus, 8).before(4).tolist() == [2, 1, 2, 3]
    (path,) = (tmp_path / "cache" / "seqlen-curriculum").iterdir()
    assert path.name.startswith("c.")
    monkeypatch.setattr(piece_index, "_count", lambda *_: pytest.fail("counted again"))
    assert PieceIndex(corpus, 8).before(4).tolist() == [2, 1, 2, 3]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file, so nothing can be written there either
    assert PieceIndex(corpus, 8).before(4).tolist() == [2, 1, 2, 3]


def test_documents_without_a_common_end_are_refused(tmp_path):
    with CorpusWriter(tmp_path / "c", 100) as writer:
        for tokens in ([1, 2, 9], [], [3, 9], [4, 5]):
            writer.add_document(np.array(tokens))
    corpus = IndexedCorpus(tmp_path / "c")
    with pytest.raises(DataError, match=r"id 9 at token 2, and another one with id 5 at token 6; .*packed"):
        Pieces([(corpus, 0, 4)], (1, 2), seed=1)
    corpus = write(tmp_path / "d", [0, 7])
    with pytest.raises(DataError, match=r"has one document, so where documents end isn't known"):
        Pieces([(corpus, 0, 2)], (1, 2), seed=1)


def test_documents_that_are_all_too_short_are_refused(tmp_path):
    corpus = write(tmp_path / "c", [3, 3, 3])
    with pytest.raises(
        DataError, match=r"data.min_piece_tokens: no document of .*c has a piece of 4 or more.* \(8 tokens"
    ):
        Pieces([(corpus, 0, 3)], (4, 8), seed=1)
