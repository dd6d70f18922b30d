"""Read tables, parquet and Arrow, as JSON lines: one for each row, also for a row that can't be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from seqlen_curriculum.data.preparation.input_files import plain_suffix
from seqlen_curriculum.errors import DataError

__all__ = ["LOST_ROW", "table_chunks"]

LOST_ROW = b"\0lost "
"""Begins the line of a row that can't be read; ``KIND:REASON`` follows. No line of JSON begins like this."""
_ROWS = 16  # decoded at once


class _LostRows(NamedTuple):
    lost: int
    reason: str

    def lines(self) -> bytes:
        """Return the line of the first row and blank lines for the others, so that later rows keep their numbers."""
        more = f" and {self.lost - 1:,} rows after it" if self.lost > 1 else ""
        return _lost_line("damaged", f"this row{more} can't be read ({self.reason})") + b"\n" * (self.lost - 1)


def _lost_line(kind: str, problem: str) -> bytes:
    return LOST_ROW + f"{kind}:{problem}; copy the file again\n".encode()


def table_chunks(path: Path, columns: list[str]) -> Iterator[tuple[bytes | str, int]]:
    """Yield (JSON lines of some rows, bytes of the file read so far), and the reason as a string where the file is damaged.

    Raises DataError for missing columns and without pyarrow.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: tables need Hugging Face's datasets; run: pip install datasets") from None
    read_rows = _parquet_rows if plain_suffix(path) == ".parquet" else _arrow_rows
    position = 0
    try:
        for rows, position in read_rows(path, columns):
            yield rows.lines() if isinstance(rows, _LostRows) else b"".join(_row_lines(rows)), position
    except (pyarrow.ArrowException, OSError) as error:
        yield " ".join(str(error).split()), position


def _row_lines(rows: Any) -> list[bytes]:
    """Return the JSON line of each row. If one is unusable, the rows are read one by one."""
    import pyarrow

    try:
        rows.validate(full=True)  # offsets within the data, and UTF-8
        values = rows.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        if rows.num_rows > 1:
            return [line for row in range(rows.num_rows) for line in _row_lines(rows.slice(row, 1))]
        reason = " ".join(str(error).split())
        is_text = isinstance(error, UnicodeDecodeError) or "UTF8" in reason
        return [_lost_line("not_utf8" if is_text else "damaged", f"can't be read ({reason})")]
    # A value that JSON can't represent (a date, bytes) becomes a list, which is refused because it is not a string.
    lines = (json.dumps(row, ensure_ascii=False, default=lambda value: [str(value)]) for row in values)
    return [f"{line}\n".encode() for line in lines]


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[Any, int]]:
    import pyarrow.parquet

    # Pages are read one by one, because a row group, parquet's unit, may be larger than memory.
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as table:
        _check_columns(path, columns, table.schema_arrow.names)
        file_bytes, rows_read = path.stat().st_size, 0
        for group in range(table.num_row_groups):
            end = rows_read + table.metadata.row_group(group).num_rows
            try:
                for rows in table.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    rows_read += rows.num_rows
                    yield rows, file_bytes * rows_read // table.metadata.num_rows  # an estimate, for the progress bar
            except (pyarrow.ArrowException, OSError) as error:
                # Reading continues with the next row group.
                yield (
                    _LostRows(end - rows_read, " ".join(str(error).split())),
                    file_bytes * end // table.metadata.num_rows,
                )
            rows_read = end


def _arrow_rows(path: Path, columns: list[str]) -> Iterator[tuple[Any, int]]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as stream:  # not a memory map, whose pages would count as used memory
        is_file_format = stream.read(6) == b"ARROW1"
        stream.seek(0)
        table = pyarrow.ipc.open_file(stream) if is_file_format else pyarrow.ipc.open_stream(stream)
        _check_columns(path, columns, table.schema.names)
        for batch in _batches_of_file(table) if is_file_format else table:
            if isinstance(batch, _LostRows):
                yield batch, stream.tell()
                continue
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.select(columns).slice(start, _ROWS), stream.tell()


def _batches_of_file(table: Any) -> Iterator[Any]:
    import pyarrow

    for number in range(table.num_record_batches):
        try:
            yield table.get_batch(number)
        except (pyarrow.ArrowException, OSError) as error:
            # The number of its rows is unknown, so later rows are counted as if it had one.
            yield _LostRows(1, f"record batch {number}: {' '.join(str(error).split())}")


def _check_columns(path: Path, columns: list[str], available: list[str]) -> None:
    missing = [column for column in columns if column not in available]
    if missing:
        names = ", ".join(map(repr, available)) or "none"
        raise DataError(f"{path}: no column {missing[0]!r}, it has {names}; select columns with --json-keys")
