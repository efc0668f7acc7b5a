"""Read rows from Arrow tables: Parquet files, folders that `datasets` saved, and datasets of the Hugging Face hub.

Columns of bytes, such as images, are not read: a row has an `Unread` in their place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError, SourceRow, Unread

ROWS_PER_READ = 1000


def read_parquet(path: Path) -> Iterator[SourceRow]:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            unread = _unread(schema)
            columns = [name for name in schema.names if name not in unread] if unread else None
            for batch in file.iter_batches(ROWS_PER_READ, columns=columns):
                for row in _rows(batch, unread):
                    number += 1
                    yield SourceRow(f"{path}, row {number}", row)
    except pyarrow.ArrowException as error:
        raise DataError(f'"{path}" cannot be read as Parquet: {error}') from error


def is_saved_dataset(path: Path) -> bool:
    """Is this a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`?"""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved_dataset(path: Path, split: str) -> Iterator[SourceRow]:
    """The rows of a folder that `save_to_disk` wrote; of a dictionary of datasets, those of `split`."""
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f'"{path}" was saved by datasets, but cannot be loaded: {_reason(error)}') from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise DataError(f'the folder "{path}" has the splits {", ".join(map(str, table))}, and none of {split}')
        table = table[split]
    yield from dataset_rows(table, str(path))


def read_hub(dataset: str, split: str, name: str | None) -> Iterator[SourceRow]:
    """The rows of a dataset of the hub."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        table = datasets.load_dataset(dataset, name, split=split)
    except Exception as error:
        if isinstance(error, DatasetNotFoundError):
            reason = "the Hugging Face hub has no such dataset, or shows it only after a login"
        elif isinstance(error, ConnectionError):
            reason = "the Hugging Face hub could not be reached to look for such a dataset"
        else:
            reason = f"the hub's dataset of that name could not be loaded: {_reason(error)}"
        raise DataError(f'there is no file or folder "{dataset}", and {reason}') from error
    yield from dataset_rows(table, f"{dataset} ({split})")


def dataset_rows(table: Any, source: str) -> Iterator[SourceRow]:
    """The rows of a `datasets.Dataset`, as they are stored: images are not decoded."""
    import pyarrow

    number = 0
    try:
        unread = _unread(table.features.arrow_schema)
        table = table.remove_columns([name for name in unread if name in table.column_names])
        for batch in table.with_format("arrow").iter(ROWS_PER_READ):
            batch.validate(full=True)  # a damaged file is mapped into memory as it is, and may point anywhere
            for row in _rows(batch, unread):
                number += 1
                yield SourceRow(f"{source}, row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unread(schema: Any) -> list[str]:
    duplicates = [name for name in schema.names if schema.names.count(name) > 1]
    if duplicates:
        raise DataError(f'the table has the column "{duplicates[0]}" twice; rename one')
    return [field.name for field in schema if _has_bytes(field.type)]


def _has_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _has_bytes(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _rows(batch: Any, unread: list[str]) -> Iterator[dict[str, Any]]:
    columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    not_read = {name: Unread("bytes, which are not read") for name in unread}
    for index in range(batch.num_rows):
        yield {name: values[index] for name, values in columns.items()} | not_read


def _values(column: Any) -> list[Any]:
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # a date that Python has not, text that is not UTF-8
        values = [_value(scalar) for scalar in column]
    nested = next((isinstance(value, list | dict) for value in values if value is not None), False)
    return [_without_missing(value) for value in values] if nested else values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError):
        return Unread(f"a {scalar.type} that is out of range")


def _without_missing(value: Any) -> Any:
    """Without the nulls in the objects of a list: Arrow gives every object of a list the keys of all of them."""
    if isinstance(value, list):
        return [
            {key: _without_missing(x) for key, x in item.items() if x is not None}
            if isinstance(item, dict)
            else _without_missing(item)
            for item in value
        ]
    if isinstance(value, dict):
        return {key: _without_missing(x) for key, x in value.items()}
    return value
