"""Records out of tables: parquet files, saved datasets, and datasets by name; streamed and bounded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intaglio.errors import CorpusError
from intaglio.plan.hub import reason
from intaglio.train.data import files
from intaglio.train.data.files import Records, grows, unreadable
from intaglio.train.data.sources import check_regular

DATASET_NAME = re.compile(r"([^:@]+)(?::([^:@]+))?(?:@([^@]+))?")


def parquet_records(path: Path, choose: Callable[[list[str]], list[str]]) -> Records:
    """Rows of a parquet file with the columns that `choose` takes of its own."""
    import pyarrow
    import pyarrow.parquet

    check_regular(path)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = choose(file.schema_arrow.names)
            size = _grown(path, file.metadata)
            rows = files.RECORD_BYTES * file.metadata.num_rows // max(size, 1)
            for batch in file.iter_batches(batch_size=max(1, min(rows, 64)), columns=columns):
                for record in batch.to_pylist():
                    yield f"{path}: row {row}", without_nulls(record)
                    row += 1
    except (OSError, UnicodeDecodeError, MemoryError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None


def _grown(path: Path, metadata: Any) -> int:
    """Bytes of a file's tables, unpacked. CorpusError if no text can be packed so small."""
    # Not column by column: pyarrow ends the process at a damaged description of a column.
    size: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if size > files.GROWTH_FLOOR and size > files.MAX_GROWTH * path.stat().st_size:
        raise grows(path)
    return size


def saved_records(path: Path, choose: Callable[[list[str]], list[str]]) -> Records:
    """Rows of a folder that a dataset's `save_to_disk` wrote: Arrow, each batch checked before its use."""
    import pyarrow
    import pyarrow.ipc

    row, columns = 0, None
    for shard in _shards(path):
        check_regular(shard)
        try:
            with pyarrow.OSFile(str(shard)) as file, pyarrow.ipc.open_stream(file) as stream:
                columns = choose(stream.schema.names) if columns is None else columns
                for batch in stream:
                    batch = batch.select(columns)
                    batch.validate(full=True)  # an offset that points elsewhere would end the process
                    for record in batch.to_pylist():
                        yield f"{path}: row {row}", without_nulls(record)
                        row += 1
        except (OSError, ValueError, KeyError, MemoryError, pyarrow.ArrowException) as error:
            raise unreadable(shard, error) from None


def _shards(path: Path) -> list[Path]:
    state = path / "state.json"
    try:
        names = [file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
        shards = [path / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise unreadable(state, error) from None
    missing = [name for name in names if not (path / name).is_file()]
    if len(shards) < len(names) or missing:
        raise unreadable(state, ValueError(f"it names files that are not there: {', '.join(missing or names)[:200]}"))
    return shards


def named_records(source: str, choose: Callable[[list[str]], list[str]]) -> Records:
    """Rows of a dataset of the Hub by its name, name:config, name@split or name:config@split.

    It is streamed: no more is fetched than is read. choose: as for files, where the dataset says its columns.
    Raises CorpusError for one that is not stored as parquet or JSON; scripts are never run.
    """
    import datasets
    from huggingface_hub import HfApi

    match = DATASET_NAME.fullmatch(source)
    if match is None:
        raise CorpusError(f"{source!r}: no such file, and no dataset: expected name, name:config or name:config@split")
    name, config, split = match.groups()
    try:
        HfApi().auth_check(name, repo_type="dataset")  # whose errors say more than those of datasets, and at once
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        if (kind := rows.info.builder_name) not in (None, "parquet", "json"):
            raise CorpusError(f"{source}: is stored as {kind}: expected parquet or JSON lines: give files of it")
        if rows.column_names:
            rows = rows.select_columns(choose(rows.column_names))
        for number, record in enumerate(rows):
            yield f"{source}: record {number}", without_nulls(record)
    except CorpusError:
        raise
    except Exception as error:  # every layer below, down to the socket, has exceptions of its own
        raise CorpusError(f"{source}: {reason(error, 'dataset')}; check the config and the split too") from None


def without_nulls(value: Any, depth: int = 0) -> Any:
    """A row of Arrow without the nulls that it has in place of what a nested object lacks."""
    if isinstance(value, dict):
        return {k: without_nulls(v, depth + 1) for k, v in value.items() if v is not None or depth == 0}
    if isinstance(value, list | tuple):
        return [without_nulls(item, depth + 1) for item in value]
    return value
