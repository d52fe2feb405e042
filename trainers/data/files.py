"""The rows of a data file, of all data files of a folder, or of a data set on the hub, as they stand there.

JSONL, JSON, Parquet, CSV (a header line, then a row a line) and text (a document a line). A folder's files are read in
the order of their names and must be of one type. Imports neither ray nor torch.
"""

import csv
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...cluster.errors import InputError

Row = dict[str, Any]

HUB = "hf://"
"""Begins the path of a data set on the hub: `hf://organisation/name`, or `hf://organisation/name/folder` in it."""


class Place(NamedTuple):
    """Where a row stands: its file, and its number there from 1."""

    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"


def read(path: Path) -> Iterator[tuple[Place, Row]]:
    """The rows of a file or folder, one at a time. Raises `InputError` with file and line for what cannot be read."""
    for file in data_files(path):
        try:
            for number, row in enumerate(_READERS[file.suffix.lower()](file), 1):
                yield Place(file, number), row
        except UnicodeDecodeError:
            raise InputError(f"{file} is not UTF-8 text: save it as UTF-8") from None
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def data_files(path: Path) -> list[Path]:
    """The data files that a path names, in the order they are read."""
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise InputError(_missing(path))
    if path.suffix.lower() not in _READERS:
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without suffix'}: give {_KNOWN}")
    return [path]


def fetch(hub_path: str) -> Path:
    """The folder of a hub data set, fetched into the hub's own cache. Raises `InputError` where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    organisation, _, rest = hub_path.removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    patterns = [f"{inside}/*" if inside else f"*{suffix}" for suffix in _READERS] if inside else None
    patterns = patterns or [f"*{suffix}" for suffix in _READERS]
    try:
        folder = Path(snapshot_download(f"{organisation}/{name}", repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"data set {hub_path!r} cannot be fetched from the hub: {reason}") from None
    return folder / inside


def _of_folder(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _READERS)
    files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not files:
        raise InputError(f"{folder} has no data files: put {_KNOWN} there, or name the file")
    kinds = sorted({p.suffix.lower() for p in files})
    if len(kinds) > 1:
        raise InputError(f"{folder} mixes {' and '.join(kinds)} files ({names(p.name for p in files)}): name one file")
    return files


def _missing(path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    if near:
        return f"no data file {path}: did you mean {near[0]}?"
    return f"no data file {path}: " + (
        f"its folder has {names(beside)}" if beside else "its folder is not there or empty"
    )


def names(given: Iterable[str]) -> str:
    """Some names for a message: the first eight in order, and how many more there are."""
    listed = sorted(given)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number} is not JSON: {error.msg} at column {error.colno}") from None
            yield _object(row, path, f"line {number}")


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        hint = ": one object a line is JSONL, name it .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno} is not JSON: {error.msg} at column {error.colno}{hint}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} holds one {type(rows).__name__}: a data file is a list of objects")
    return (_object(row, path, f"row {n}") for n, row in enumerate(rows, 1))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None
    return (row for batch in file.iter_batches() for row in batch.to_pylist())


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a document is often longer than the 128 KiB it allows
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}:{reader.line_num} has another number of fields than the header's "
                        f"{len(reader.fieldnames or ())}: put text with commas or line breaks in quotes"
                    )
                yield row
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num} is not CSV: {error}: check its quotes") from None


def _text(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        yield from ({"text": line.rstrip("\n")} for line in file if line.strip())


def _object(row: object, path: Path, place: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{path}, {place}: a row is an object with columns, not {type(row).__name__}")
    return row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _text,
}
_KNOWN = ".jsonl, .json, .parquet, .csv or .txt"
