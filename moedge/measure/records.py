"""Task files as records: JSON lines, JSON, SQuAD's and PubMedQA's JSON, MMLU's CSV. Knows no prompts and no models."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moedge.errors import DataError


def read_records(path: str | Path, limit: int | None = None) -> list[Any]:
    """The first `limit` records of a file, or of all CSV files of a folder. DataError names file and place.

    `.csv`: rows. `.json`: a list, SQuAD's articles (a record per question), or an object of records by id. Any other
    name: one JSON value a line.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise DataError(f"{path} is a folder without CSV files: name a file")
    else:
        files = [path]
    found = list(islice((record for file in files for record in _records(file)), limit))
    if not found:
        raise DataError(f"{path} has no records")
    return found


def _records(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                yield from csv.reader(file)
        elif path.suffix == ".json":
            yield from _whole(path, json.loads(path.read_text(encoding="utf-8")))
        else:
            yield from _lines(path)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number} is not JSON ({error.msg}): one record a line") from error


def _whole(path: Path, value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from value
    elif isinstance(value, dict) and isinstance(value.get("data"), list):
        yield from _squad(path, value["data"])
    elif isinstance(value, dict) and all(isinstance(record, dict) for record in value.values()):
        yield from value.values()
    else:
        raise DataError(f"{path} is neither a list of records, nor an object of records, nor SQuAD's articles")


def _squad(path: Path, articles: list[Any]) -> Iterator[dict[str, Any]]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {"context": paragraph["context"], "is_impossible": False} | question
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not in SQuAD's format: {type(error).__name__} {error}") from error
