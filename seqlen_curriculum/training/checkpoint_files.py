"""The files of a checkpoint: written and flushed by every rank, either immediately or in a background thread.

Ranks report through torch's store, because collectives of a thread would interleave with those of the training loop.
"""

from __future__ import annotations

import datetime
import io
import itertools
import json
import os
import threading
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from safetensors import SafetensorError

from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.training.read_shard import read_shard

__all__ = ["ModelWriter", "PendingSave", "ShardFiles", "nothing_to_write", "shard_files", "write_part"]

ModelWriter: TypeAlias = Callable[[], Callable[[Path], None]]
"""Copies the weights to host memory and returns a function that writes them to a folder. Call both on all ranks."""
_AS_LONG_AS_IT_TAKES = datetime.timedelta(days=1)
"""Long enough for any write; if a rank dies, the launcher ends the launch."""
_EXPECTED = (OSError, RuntimeError, SafetensorError, MemoryError, SeqlenCurriculumError)
"""Errors reported without a traceback. torch raises RuntimeError for some failed writes."""
_numbers = itertools.count()


class ShardFiles(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed checkpoint engine that writes this rank's shards and flushes each file to disk.

    ``in_background``: ``save`` serialises to host memory, and ``write_held`` writes the same bytes later.
    """

    def __init__(self, engine: TorchCheckpointEngine) -> None:
        super().__init__()
        self._engine, self._in_background = engine, False
        self._held: dict[Path, io.BytesIO] = {}
        self.crc32: dict[Path, int] = {}
        """CRC-32 of the files written since ``begin``."""
        self.problem = ""
        """The reason why a file couldn't be written. Not raised, because other ranks wait for this one in DeepSpeed."""

    def begin(self, in_background: bool) -> None:
        """Reset the state of the previous checkpoint."""
        self._in_background = in_background
        self._held, self.crc32, self.problem = {}, {}, ""

    def create(self, info: Any) -> None:
        """Call DeepSpeed's hook for a new checkpoint."""
        self._engine.create(info)

    def save(self, state_dict: Any, path: str) -> None:
        """Write ``state_dict`` as ``torch.save`` does, or hold the bytes in memory."""
        try:
            if self._in_background:
                held = io.BytesIO()
                self._serialise(state_dict, held)
                self._held[Path(path)] = held
            else:
                self._write(state_dict, path)
        except (OSError, RuntimeError, MemoryError) as error:
            self.problem = self.problem or str(error) or type(error).__name__

    def _write(self, state_dict: Any, path: str) -> None:
        with open(path, "wb") as file:
            checked = _Checked(file)
            try:
                self._serialise(state_dict, checked)
            except RuntimeError as error:  # torch's "unexpected pos", where a write has failed before
                raise checked.error or error from error
            _flush(file)
        self.crc32[Path(path)] = checked.crc32

    def _serialise(self, state_dict: Any, file: Any) -> None:
        torch.save(state_dict, file, _use_new_zipfile_serialization=self._engine.zipfile_serialization)

    def write_held(self) -> None:
        """Write the files held in memory, and free them. Raises OSError."""
        while self._held:
            path, held = self._held.popitem()
            with open(path, "wb") as file, held.getbuffer() as content:
                file.write(content)
                _flush(file)
                self.crc32[path] = zlib.crc32(content)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file written by ``save``. Raises CheckpointError for one with other content."""
        return read_shard(path, map_location)

    def commit(self, info: Any) -> bool:
        """Return True; the manifest, not DeepSpeed, marks a checkpoint as complete."""
        return bool(self._engine.commit(info))


def shard_files(engine: Any) -> ShardFiles | None:
    """Return the reader and writer of the shards of DeepSpeed's ``engine``; the first call installs it.

    Returns None if ``checkpoint.writer`` in the file selects one of DeepSpeed's writers.
    """
    if type(engine.checkpoint_engine) is TorchCheckpointEngine:
        engine.checkpoint_engine = ShardFiles(engine.checkpoint_engine)
    return engine.checkpoint_engine if isinstance(engine.checkpoint_engine, ShardFiles) else None


def write_part(files: ShardFiles | None, folder: Path, write_model: Callable[[Path], None]) -> dict[str, int]:
    """Write this rank's part of a checkpoint to ``folder``; return the CRC-32 of the flushed files, by name."""
    if files is not None:
        if files.problem:
            raise OSError(files.problem)
        files.write_held()
    write_model(folder)
    return {str(path.relative_to(folder)): value for path, value in files.crc32.items()} if files is not None else {}


def nothing_to_write(_folder: Path) -> None:
    """Write nothing, because another rank has the weights."""


class _Checked:
    """A file open for writing, and the CRC-32 of the written bytes."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self.crc32 = file, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _flush(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


class PendingSave:
    """A checkpoint being written, with the same outcome on all ranks.

    ``store`` is a client of torch's store for this object alone. ``write()`` writes this rank's files and returns their
    CRC-32 by name. Then rank 0 completes the checkpoint with ``publish(files)``, given the files of all ranks, or cleans up
    with ``fail(problem)``, which returns the message for all ranks.
    """

    def __init__(
        self,
        store: Any,
        write: Callable[[], dict[str, int]],
        publish: Callable[[Mapping[str, int]], None],
        fail: Callable[[str], str],
    ) -> None:
        self._store, self._write, self._publish, self._fail = store, write, publish, fail
        self._key, self._thread = f"checkpoint/{next(_numbers)}", threading.Thread(target=self.run, daemon=True)

    def start(self) -> None:
        """Start ``run`` in a background thread."""
        self._thread.start()

    def run(self) -> None:
        """Write this rank's part; on rank 0, complete the checkpoint once all ranks have written theirs."""
        rank, files, problem = dist.get_rank(), {}, ""
        try:
            files = self._write()
        except _EXPECTED as error:
            problem = str(error) or type(error).__name__
        except Exception as error:  # reported too, because rank 0 waits for every rank
            problem = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self._write = dict  # frees the memory of the weights
        self._store.set(f"{self._key}/{rank}", json.dumps([files, problem]))
        if rank == 0:
            self._store.set(self._key, self._outcome())

    def _outcome(self) -> str:
        """Complete the checkpoint; return an error message, "" on success."""
        names = [f"{self._key}/{rank}" for rank in range(dist.get_world_size())]
        self._store.wait(names, _AS_LONG_AS_IT_TAKES)
        reports = [json.loads(report) for report in self._store.multi_get(names)]
        for name in names:
            self._store.delete_key(name)
        problems = [
            f"rank {rank}: {problem}" if rank else problem for rank, (_, problem) in enumerate(reports) if problem
        ]
        if problems:
            return self._fail(problems[0])
        try:
            self._publish({name: crc32 for files, _ in reports for name, crc32 in files.items()})
        except SeqlenCurriculumError as error:
            return str(error)
        except Exception as error:
            return self._fail(str(error))
        return ""

    def problem(self) -> str:
        """Wait for the checkpoint on all ranks; return an error message, "" on success."""
        if self._thread.is_alive():
            self._thread.join()
        self._store.wait([self._key], _AS_LONG_AS_IT_TAKES)
        return str(self._store.get(self._key).decode())
