"""Parquet files that are written row by row."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from cbd.shards import GROUP_BYTES, GROUP_ROWS


class Table:
    """A Parquet file that is written row by row and holds a bounded buffer in memory."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self._columns = columns
        self._writer = pq.ParquetWriter(path, columns, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0

    def add(self, row: dict[str, Any], num_bytes: int = 0) -> None:
        """Appends a row that holds `num_bytes` of image."""
        self._rows.append(row)
        self._num_bytes += num_bytes
        if len(self._rows) == GROUP_ROWS or self._num_bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._columns))
        self._rows, self._num_bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.close()
