"""Prompt files to records: CSV, TSV, JSON, JSON Lines, Parquet and plain text, told apart by the ending of the name."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from erasure.errors import ErasureError

Record = dict[str, str]
"""Column -> text; an empty cell is the empty string."""


def read_records(name: str, data: bytes) -> list[Record]:
    """The records of a file called ``name``; a ".gz" behind the ending is undone.

    JSON is a list of objects, a list of texts, an object of equally long lists, or an object that holds one such list.
    Text has one prompt a line, in the column "prompt". Raises ErasureError for an unknown ending, a damaged file, or no records.
    """
    path = PurePosixPath(name)
    if path.suffix == ".gz":
        import gzip

        data, path = gzip.decompress(data), path.with_suffix("")
    if path.suffix not in READERS:
        raise ErasureError(f"{name}: prompts are read from {', '.join(READERS)} (also with .gz behind), not from {path.suffix or 'that'!r}")
    try:
        records = READERS[path.suffix](data)
    except (ValueError, csv.Error, TypeError) as error:  # ValueError: not UTF-8, not JSON, or unlike what the ending says
        raise ErasureError(f"{name} is not a {path.suffix} file of prompts: {error}") from error
    if not records:
        raise ErasureError(f"{name} has no rows: give a file with at least one prompt")
    return records


def _delimited(separator: str) -> Callable[[bytes], list[Record]]:
    def read(data: bytes) -> list[Record]:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=separator, strict=True)
        records = []
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"line {rows.line_num} has another number of cells than the header")
            records.append({key: value.strip() for key, value in row.items()})
        return records

    return read


def _text(data: bytes) -> list[Record]:
    return [{"prompt": line.strip()} for line in data.decode("utf-8-sig").split("\n") if line.strip()]


def _json_lines(data: bytes) -> list[Record]:
    return _records([json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()])


def _json(data: bytes) -> list[Record]:
    content = json.loads(data.decode("utf-8-sig"))
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) == 1:
            content = next(iter(lists.values()))
        elif lists and len(lists) == len(content) and len({len(value) for value in lists.values()}) == 1:
            content = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        else:
            raise ValueError("an object with neither one list of rows nor equally long lists as columns")
    return _records(content)


def _parquet(data: bytes) -> list[Record]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ErasureError("a .parquet file is read with pyarrow: pip install pyarrow, or convert the file to .csv") from error
    return _records(pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist())


def _records(rows: Any) -> list[Record]:
    if not isinstance(rows, list):
        raise ValueError(f"its rows are a {type(rows).__name__}, not a list")
    return [{"prompt": row.strip()} if isinstance(row, str) else {str(k): _cell(v) for k, v in dict(row).items()} for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):  # labels as {name: bool}
        return ", ".join(str(key) for key, there in value.items() if there)
    return str(value).strip()


READERS: dict[str, Callable[[bytes], list[Record]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".txt": _text,
}
