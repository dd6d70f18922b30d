"""Write Megatron's indexed corpus as a stream, byte-identical to megatron-core's ``IndexedDatasetBuilder``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.data.indexed import HEADER, MAGIC, VERSION, IndexedCorpus
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.files import move, replace, sync
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["CorpusWriter", "TokenFiles", "publish", "token_dtype"]

_CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}
_MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are i32 in the format
_BLOCK = 2**16  # documents whose lengths are held in memory
_COPY_BYTES = 2**20


def token_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Return Megatron's dtype: uint16 for a vocabulary below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class TokenFiles:
    """A .bin file and a file of its document lengths, both appended to on disk.

    To continue existing files, give the ``num_tokens`` and ``num_documents`` to keep. Everything after them is truncated.
    The last ``open_tokens`` tokens belong to an unfinished document. Raises ``DataError`` for a token outside
    ``0..vocab_size - 1``.
    """

    def __init__(
        self,
        bin_path: str,
        lengths_path: str,
        vocab_size: int,
        num_tokens: int = 0,
        num_documents: int = 0,
        open_tokens: int = 0,
    ) -> None:
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = num_tokens
        self.num_documents = num_documents
        self.open_tokens = open_tokens
        self._bin = _open_at(bin_path, num_tokens * self.dtype.itemsize)
        self._lengths = _open_at(lengths_path, num_documents * 4)

    def add_tokens(self, tokens: ArrayLike, ends: Sequence[int] | IntArray) -> None:
        """Append ``tokens`` (n,); a document ends before each position of ``ends``, ascending, in 0..n.

        Tokens after the last end belong to a document that a later call continues.
        """
        ids = np.asarray(tokens)
        self._check_ids(ids)
        # Three open tokens, then four more with ends at 1 and 3: documents of 3 + 1 = 4 and 2 tokens, one token stays open.
        lengths = np.diff(np.asarray(ends, dtype=np.int64), prepend=-self.open_tokens)
        if lengths.size and (int(lengths.min()) < 0 or int(ends[-1]) > len(ids)):
            raise ValueError("ends must ascend within the tokens")
        if lengths.size and int(lengths.max()) > _MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"{self._bin.name}: a document has {lengths.max()} tokens, the format holds 2**31 - 1; split it"
            )
        self._bin.write(ids.astype(self.dtype, copy=False).tobytes())
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_tokens += len(ids)
        self.num_documents += len(lengths)
        self.open_tokens = len(ids) - int(ends[-1]) if lengths.size else self.open_tokens + len(ids)

    def add_corpus(self, prefix: str) -> None:
        """Append a finished corpus of the same dtype, whose documents have one sequence each."""
        corpus = IndexedCorpus(prefix)
        lengths = corpus.index.lengths
        if corpus.dtype != self.dtype or len(lengths) != corpus.num_documents:
            raise DataError(f"{prefix}: not in {self.dtype.name} with one sequence per document; prepare it again")
        for first in range(0, len(lengths), _BLOCK):
            self._lengths.write(lengths[first : first + _BLOCK].tobytes())
        with open(prefix + ".bin", "rb") as tokens:
            shutil.copyfileobj(tokens, self._bin, _COPY_BYTES)
        self.num_tokens += corpus.num_tokens
        self.num_documents += corpus.num_documents

    def sync(self) -> None:
        """Flush all added data to disk."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def write_index(self, path: str) -> None:
        """Write the .idx of all added data, and flush all three files to disk."""
        if self.open_tokens:
            raise ValueError(f"the last {self.open_tokens} tokens belong to an unfinished document")
        self.sync()
        count = self.num_documents
        with open(path, "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], count, count + 1))
            for lengths in self._lengths_in_blocks():
                index.write(lengths.tobytes())
            # Byte offsets: documents of 4, 2 and 5 tokens start at tokens 0, 4, 6, as uint16 at bytes 0, 8, 12.
            start = 0
            for lengths in self._lengths_in_blocks():
                ends = start + np.cumsum(lengths, dtype="<i8")  # (block,) tokens
                index.write(((ends - lengths) * self.dtype.itemsize).tobytes())
                start = int(ends[-1])
            for first in range(0, count + 1, _BLOCK):  # document indices: one sequence per document
                index.write(np.arange(first, min(first + _BLOCK, count + 1), dtype="<i8").tobytes())
        sync(Path(path))

    def close(self) -> None:
        """Close both files without raising."""
        for stream in (self._bin, self._lengths):
            with suppress(OSError):  # a full disk has already raised
                stream.close()

    def _lengths_in_blocks(self) -> Iterator[NDArray[np.int32]]:
        with open(self._lengths.name, "rb") as stream:
            while data := stream.read(4 * _BLOCK):
                yield np.frombuffer(data, dtype="<i4")

    def _check_ids(self, ids: NDArray[np.generic]) -> None:
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"tokens must be one row of integers, not {ids.ndim}-d {ids.dtype}")
        low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
        if low < 0 or high >= self.vocab_size:
            worst = low if low < 0 else high
            raise DataError(f"{self._bin.name}: token id {worst} is outside the vocabulary of {self.vocab_size}")


class CorpusWriter:
    """Context manager that writes ``PREFIX.bin`` and ``PREFIX.idx``, holding only the data of one call in memory.

    Files have temporary names in the same folder until the block ends without an exception. Then they are renamed, the
    .idx last, so that a pair with an .idx is complete. An exception removes them and leaves older files of that prefix
    unchanged. Raises ``DataError`` for a token outside ``0..vocab_size - 1`` and for a folder that can't be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        self.prefix = corpus_prefix(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._beside: list[str] = []
        self._files: TokenFiles | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._files.num_tokens if self._files else 0

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return self._files.num_documents if self._files else 0

    def __enter__(self) -> CorpusWriter:
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._files = TokenFiles(self._temporary(".bin"), self._temporary(".lengths"), self.vocab_size)
        except OSError as error:
            raise DataError(f"{self.prefix}: can't write here ({error.strerror}); choose another prefix") from error
        return self

    def add_document(self, tokens: ArrayLike) -> None:
        """Append one document, including its end-of-text token; ``tokens`` are (n,) integers."""
        flat = np.asarray(tokens)
        self.add_tokens(flat, [len(flat)])

    def add_tokens(self, tokens: ArrayLike, ends: Sequence[int] | IntArray) -> None:
        """Append ``tokens`` (n,); a document ends before each position of ``ends``, ascending, in 0..n.

        Tokens after the last end belong to a document that a later call continues.
        """
        if self._files is None:
            raise ValueError("CorpusWriter is used inside its `with` block only")
        self._files.add_tokens(tokens, ends)

    def add_corpus(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of a finished corpus of the same dtype."""
        if self._files is None:
            raise ValueError("CorpusWriter is used inside its `with` block only")
        self._files.add_corpus(corpus_prefix(prefix))

    def add_file(self, suffix: str, content: bytes) -> None:
        """Add a file ``PREFIX + suffix`` that is renamed with the pair, before the .idx."""
        if suffix not in self._beside:
            self._beside.append(suffix)
        replace(Path(self._temporary(suffix)), lambda unfinished: unfinished.write_bytes(content))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = error if isinstance(error, OSError) else None
        try:
            if kind is None and self._files is not None:
                self._files.write_index(self._temporary(".idx"))
                publish({suffix: self._temporary(suffix) for suffix in (".bin", *self._beside, ".idx")}, self.prefix)
        except OSError as late:
            failure = late
        finally:
            if self._files is not None:
                self._files.close()
            for suffix in (".bin", ".lengths", *self._beside, ".idx"):
                Path(self._temporary(suffix)).unlink(missing_ok=True)
        if failure is not None:
            raise DataError(f"{self.prefix}: can't be written ({failure.strerror}); free space or move it") from failure

    def _temporary(self, suffix: str) -> str:
        # The process id keeps two processes with the same prefix from writing to each other's files.
        return f"{self.prefix}{suffix}.{os.getpid()}.tmp"


def publish(files: Mapping[str, str], prefix: str) -> None:
    """Move each of ``files`` {suffix: path} to ``prefix + suffix``, in order; skip those already moved."""
    # An older .idx must never be beside the new .bin, because they would look like a complete pair.
    if os.path.exists(files[".bin"]):
        Path(prefix + ".idx").unlink(missing_ok=True)
    for suffix, path in files.items():
        if os.path.exists(path):
            move(Path(path), Path(prefix + suffix))


def _open_at(path: str, size: int) -> BinaryIO:
    """Truncate a file to its first ``size`` bytes and open it for appending."""
    if size and (not os.path.exists(path) or os.path.getsize(path) < size):
        raise DataError(f"{path}: is shorter than the {size} bytes recorded for it; remove its folder and start again")
    stream = open(path, "r+b" if size else "wb")  # noqa: SIM115 - the caller closes it
    stream.truncate(size)
    stream.seek(size)
    return stream
