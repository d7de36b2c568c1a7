"""How a file holds its values: JSON lines, one JSON array, a table with a header (CSV, TSV), or a text per line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vectors.errors import ExampleError

TABLES = {".csv": ",", ".tsv": "\t"}
LARGEST_CELL = 2**24  # characters; Python's csv module has a limit for the process, which is set no lower than this

# The first bytes of files that hold no text, what they are, and how their values become JSON lines.
_BINARY = {
    b"PAR1": ("a Parquet file", 'pandas.read_parquet("{name}").to_json("{stem}.jsonl", orient="records", lines=True)'),
    b"ARROW1": ("an Arrow file", 'datasets.Dataset.from_file("{name}").to_json("{stem}.jsonl")'),
    b"\x1f\x8b": ("a gzip file", "gunzip {name}"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "zstd -d {name}"),
    b"PK\x03\x04": ("a zip file, or a spreadsheet", "unpack it, or save the spreadsheet as CSV"),
    b"\xff\xfe": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 {name} > {stem}-utf8.jsonl"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 {name} > {stem}-utf8.jsonl"),
}


class Record(NamedTuple):
    """A value of a file, or the problem with it; `origin` is FILE:LINE, or FILE:item N in an array."""

    origin: str
    value: Any = None
    problem: str = ""


def decoded(path: Path, content: bytes) -> str:
    """The text of a file. Raises ExampleError for one that is not UTF-8 text, with what it seems to be."""
    for magic, (kind, conversion) in _BINARY.items():
        if content.startswith(magic):
            hint = conversion.format(name=path.name, stem=path.stem)
            raise ExampleError(f"{path} looks like {kind}, not like JSON lines", f"convert it: {hint}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExampleError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8 JSON lines") from error


def records(name: str, text: str) -> list[Record]:
    """The values of a file of this name, in order. Values that can't be read are records with a problem."""
    suffix = Path(name).suffix.lower()
    if suffix in TABLES:
        return list(_rows(name, text, TABLES[suffix]))
    if suffix == ".txt" and not text.lstrip().startswith(("{", "[", '"')):
        return [Record(f"{name}:{number}", line.strip()) for number, line in _lines(text)]
    if text.lstrip().startswith("["):
        items = _parsed(text)
        if isinstance(items, list):
            return [Record(f"{name}:item {number}", item) for number, item in enumerate(items, 1)]
    return lines(name, text)


def lines(name: str, text: str) -> list[Record]:
    """The values of JSON lines."""
    return [_line(line, f"{name}:{number}") for number, line in _lines(text)]


def likely(read: list[Record], text: str) -> str:
    """A hint at what a file with unreadable values may be; empty if all were read, or nothing suggests itself."""
    if not any(record.problem for record in read):
        return ""
    value = _parsed(text)
    if isinstance(value, dict):
        lists = [key for key, entry in value.items() if isinstance(entry, list)]
        where = f" whose values may lie under {lists[0]!r}" if lists else ""
        return f"it looks like one JSON object over several lines{where}: write one value a line, or an array"
    if text.lstrip().startswith("["):
        return "it looks like a JSON array that is cut or damaged"
    if not all(record.problem for record in read):
        return ""
    first = next(line for _, line in _lines(text))
    for suffix, separator in TABLES.items():
        if separator in first and not first.startswith(("{", '{"')):
            return f"if it is a table with the header {first.strip()[:60]!r}, name it {suffix}"
    return "" if first.lstrip().startswith(("{", '"')) else "if each line is a plain text, name it .txt"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, and their numbers."""
    # Only \n ends a line of JSON lines: str.splitlines would cut at characters that JSON strings may hold.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _line(line: str, origin: str) -> Record:
    try:
        return Record(origin, json.loads(line))
    except json.JSONDecodeError as error:
        return Record(origin, problem=f"invalid JSON at column {error.colno}: {error.msg}")
    except RecursionError:
        return Record(origin, problem="invalid JSON: nested too deeply")
    except ValueError as error:  # such as a number with too many digits
        return Record(origin, problem=f"invalid JSON: {error}")


def _parsed(text: str) -> Any:
    """The value of a text that is JSON as a whole; None if it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _rows(name: str, text: str, separator: str) -> Iterator[Record]:
    """The rows of a table as objects whose keys are the header's; cells that hold JSON lists or objects are parsed."""
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    try:
        for row in reader:
            origin = f"{name}:{reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
                if len(set(header)) < len(header):
                    yield Record(origin, problem=f"the header names a column twice: {', '.join(header)[:60]}")
                    return
            elif len(row) != len(header):
                yield Record(origin, problem=f"the row has {len(row)} cells, and the header {len(header)}")
            else:
                yield Record(origin, {key: _cell(cell) for key, cell in zip(header, row, strict=True)})
    except csv.Error as error:
        yield Record(f"{name}:{reader.line_num}", problem=f"invalid CSV: {error}")


def _cell(text: str) -> Any:
    """A cell's text, or the list or object that it holds as JSON, such as messages."""
    value = _parsed(text) if text.lstrip().startswith(("[{", '["', '{"')) else None
    return text if value is None else value
