"""Writes Megatron's indexed corpus as a stream, byte-identical with megatron-core's ``IndexedDatasetBuilder``."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqlen_curriculum.data.indexed import HEADER, MAGIC, VERSION, corpus_prefix
from seqlen_curriculum.errors import DataError

__all__ = ["CorpusWriter", "token_dtype"]

_CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}
_MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are i32 in the format


def token_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Megatron's rule: uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class CorpusWriter:
    """Context manager that writes ``PREFIX.bin`` and ``PREFIX.idx``; only the documents' lengths are held in memory.

    Files get temporary names in the same folder and move into place when the block ends without an exception, the
    .idx last: a pair with an .idx is complete. An exception removes them and leaves older files of that prefix as they
    were. Raises ``DataError`` for a token outside ``0..vocab_size - 1`` and for a folder that can't be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        self.prefix = corpus_prefix(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")
        self._open_tokens = 0
        self._beside: list[str] = []
        self._bin: BinaryIO | None = None

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return len(self._lengths)

    def __enter__(self) -> CorpusWriter:
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._temporary(".bin"), "wb")
        except OSError as error:
            raise DataError(f"{self.prefix}: can't write here ({error.strerror}); choose another prefix") from error
        return self

    def add_document(self, tokens: ArrayLike) -> None:
        """Append one document, its end-of-text token included; ``tokens`` (n,) integers."""
        flat = np.asarray(tokens)
        self.add_tokens(flat, [len(flat)])

    def add_tokens(self, tokens: ArrayLike, ends: Sequence[int] | NDArray[np.int64]) -> None:
        """Append ``tokens`` (n,); a document ends before each position of ``ends``, ascending, in 0..n.

        Tokens after the last end belong to a document that a later call continues.
        """
        ids = np.asarray(tokens)
        self._check_ids(ids)
        lengths = np.diff(np.asarray(ends, dtype=np.int64), prepend=-self._open_tokens)
        if lengths.size and (int(lengths.min()) < 0 or int(ends[-1]) > len(ids)):
            raise ValueError("ends must ascend within the tokens")
        if lengths.size and int(lengths.max()) > _MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"{self.prefix}: a document has {lengths.max()} tokens, the format holds 2**31 - 1; split it"
            )
        self._write(ids.astype(self.dtype, copy=False).tobytes())
        self._lengths.extend(lengths.tolist())
        self.num_tokens += len(ids)
        self._open_tokens = len(ids) - int(ends[-1]) if lengths.size else self._open_tokens + len(ids)

    def add_file(self, suffix: str, content: bytes) -> None:
        """A file ``PREFIX + suffix`` that moves into place with the pair, before the .idx."""
        if suffix not in self._beside:
            self._beside.append(suffix)
        self._store(suffix, content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            raise DataError(f"{self.prefix}: can't be written ({failure.strerror}); free space or move it") from failure
        finally:
            self._discard()

    def _check_ids(self, ids: NDArray[np.generic]) -> None:
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"tokens must be one row of integers, not {ids.ndim}-d {ids.dtype}")
        low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
        if low < 0 or high >= self.vocab_size:
            worst = low if low < 0 else high
            raise DataError(f"{self.prefix}: token id {worst} is outside the vocabulary of {self.vocab_size}")

    def _write(self, data: bytes) -> None:
        if self._bin is None:
            raise ValueError("CorpusWriter is used inside its `with` block only")
        try:
            self._bin.write(data)
        except OSError as error:
            raise DataError(f"{self.prefix}.bin: can't be written ({error.strerror}); free space or move it") from error

    def _finish(self) -> None:
        if self._open_tokens:
            raise ValueError(f"{self._open_tokens} tokens at the end belong to a document that never ended")
        assert self._bin is not None
        _sync_and_close(self._bin)
        self._store(".idx", self._index())
        # An older .idx must not stand beside the new .bin, not even for a moment.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        for suffix in (".bin", *self._beside, ".idx"):
            os.replace(self._temporary(suffix), self.prefix + suffix)
        _sync_folder(Path(self.prefix).parent)

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, dtype="<i4")  # (N,)
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        documents = np.arange(len(lengths) + 1, dtype="<i8")  # one sequence a document
        header = HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(documents))
        return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()

    def _store(self, suffix: str, content: bytes) -> None:
        with open(self._temporary(suffix), "wb") as stream:
            stream.write(content)
            _sync_and_close(stream)

    def _discard(self) -> None:
        if self._bin is not None:
            self._bin.close()
        for suffix in (".bin", *self._beside, ".idx"):
            Path(self._temporary(suffix)).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> str:
        # The process id keeps two runs that were given one prefix from writing into each other's files.
        return f"{self.prefix}{suffix}.{os.getpid()}.tmp"


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves durable, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
