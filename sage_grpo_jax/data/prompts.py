"""Reads prompt files: plain text, CSV with a header, or JSON lines.

    .txt    one prompt a line; its id is the line number, as in "000012"
    .csv    a header with a column "prompt" and, if wanted, "id" and "image"
    .jsonl  one object a line with "prompt" and, if wanted, "id" and "image"

Other columns and fields are ignored. Files are UTF-8. Prompts are stripped of white space at both
ends and must not be empty: the empty prompt is the negative one, which every embedding cache holds
anyway. An image, the first frame of an image-to-video clip, is a path relative to the file.
"""

import csv
import io
import json
import pathlib
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Control characters, unpaired surrogates, line and paragraph separators.
_FORBIDDEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")


class Prompt(NamedTuple):
    """A prompt and the name under which its embedding and its noise are found."""

    id: str
    text: str
    image: pathlib.Path | None = None  # the first frame, for image-to-video


class _Row(NamedTuple):
    line: int
    id: Any  # None: take the line number
    text: Any
    image: Any = None


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
    """Reads all prompts of a file, in order.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: naming file and line, for an unknown file type, text that is not UTF-8, bad CSV
        or JSON, a missing or empty prompt, control characters, a duplicate id, or no prompts; or
        that there is no path. Whether images exist is not looked at: only who needs them opens
        them.
    """
    # Which reader.
    if not str(path):
        raise ValueError("no file is named; allowed: a .txt, .csv or .jsonl file")
    path = pathlib.Path(path)
    readers: dict[str, Callable[[pathlib.Path, str], Iterator[_Row]]] = {
        ".txt": _text_rows,
        ".csv": _csv_rows,
        ".jsonl": _json_rows,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: file type {path.suffix!r}; allowed: {', '.join(readers)}")

    # Every row, with its place for the message. Ids are looked up for embedding and noise.
    rows = readers[path.suffix.lower()](path, _read_text(path))
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for row in rows:
        prompt = _check(row, f"{path}, line {row.line}", path.parent)
        if prompt.id in lines:
            raise ValueError(
                f"{path}, line {row.line}: id {prompt.id!r} was used in line {lines[prompt.id]}; "
                "ids must differ"
            )
        lines[prompt.id] = row.line
        prompts.append(prompt)

    if not prompts:
        raise ValueError(f"{path}: no prompts; at least one is needed")
    return prompts


def _read_text(path: pathlib.Path) -> str:
    data = path.read_bytes()
    try:
        # Without the mark that some programs put before the text.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8 ({error.reason})"
        ) from error


def _lines(text: str) -> list[str]:
    # Not str.splitlines: it also splits at characters that belong in an error message.
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _text_rows(path: pathlib.Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(_lines(text), 1):
        yield _Row(number, None, line)


def _csv_rows(path: pathlib.Path, text: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        # The header.
        columns = reader.fieldnames or []
        if "prompt" not in columns:
            raise ValueError(f"{path}, line 1: columns {columns}; one must be 'prompt'")
        if len(set(columns)) != len(columns):
            raise ValueError(f"{path}, line 1: columns {columns}; names must differ")

        # The rows. One may span lines: the line that is named is its first.
        line = reader.line_num + 1
        for fields in reader:
            # DictReader keeps what has no column under None.
            if None in fields:
                raise ValueError(
                    f"{path}, line {line}: more fields than the {len(columns)} columns of the "
                    "header; quote prompts that contain commas"
                )
            image = fields.get("image") or None  # a table has a cell where there is no image
            yield _Row(line, fields.get("id"), fields["prompt"], image)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: bad CSV: {error}") from error


def _json_rows(path: pathlib.Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(_lines(text), 1):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
            reason = str(error).partition("; use sys.")[0]
            raise ValueError(f"{where}: bad JSON: {reason}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: {type(entry).__name__}; each line must be a JSON object")
        if "prompt" not in entry:
            raise ValueError(f"{where}: fields {sorted(entry)}; one must be 'prompt'")
        name = entry.get("id")
        # A number will do as an id; `true`, an int to Python, will not.
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        yield _Row(number, name, entry["prompt"], entry.get("image"))


def _check(row: _Row, where: str, folder: pathlib.Path) -> Prompt:
    name = f"{row.line:06d}" if row.id is None else row.id
    name, text = _checked_text("id", name, where), _checked_text("prompt", row.text, where)
    image = None if row.image is None else folder / _checked_text("image", row.image, where)
    return Prompt(name, text, image)


def _checked_text(field: str, value: Any, where: str) -> str:
    """The value without white space at its ends."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} is {value!r}; it must be a string")
    value = value.strip()
    if not value:
        raise ValueError(f"{where}: the {field} is empty")
    for place, character in enumerate(value, 1):
        if unicodedata.category(character) in _FORBIDDEN_CATEGORIES:
            raise ValueError(
                f"{where}: the {field} has the control character {character!r} at "
                f"place {place}; remove it"
            )
    return value
