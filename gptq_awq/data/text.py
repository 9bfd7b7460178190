"""Texts as lists of documents, read from plain, JSON lines and parquet files; WikiText's articles and line joining."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_awq.errors import UserError


@dataclass(frozen=True)
class Text:
    """A text as a list of documents, with its origin and hash.

    Attributes:
        name: prefix of metric names (`wikitext2/ppl@2048`), so two texts that score differently need two names.
        documents: the documents.
        source: where the text came from.
        sha256: hash of the joined text (utf-8).
        joiner: string between documents wherever they are read as one text.
    """

    name: str
    documents: tuple[str, ...]
    source: str
    sha256: str
    joiner: str = "\n\n"

    @property
    def joined(self) -> str:
        """The documents joined into one text."""
        return self.joiner.join(self.documents)


def make_text(name: str, documents: Iterable[str], source: str, joiner: str = "\n\n") -> Text:
    """Make a `Text` of these documents, with its hash; halves of surrogate pairs, which utf-8 has not, are U+FFFD."""
    documents = tuple(map(without_surrogates, documents))
    digest = hashlib.sha256(joiner.join(documents).encode()).hexdigest()
    return Text(name, documents, source, digest, joiner)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone half of a surrogate pair, as in JSON cut off within an emoji."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def wikitext_articles(raw: str) -> list[str]:
    """Split raw WikiText into articles, at each title (" = Title = " between blank lines); joined, they are `raw`."""
    articles = re.split(r"^(?= \n = [^=\n]+ = \n \n)", raw, flags=re.MULTILINE)
    return [article for article in articles if article]


def joined_as_gptq(article: str) -> str:
    """Join an article's rows on the hub (its lines, "" for a blank one) by "\\n\\n", as the GPTQ code does."""
    return "\n\n".join("" if line == " \n" else line for line in re.findall(r".*\n", article))


def read_plain(path: Path, field: str, option: str) -> list[str]:  # noqa: ARG001
    """Read a file as one document. Raises UserError naming `option` where it isn't utf-8."""
    try:
        return [path.read_bytes().decode()]  # not read_text, which would rewrite line ends
    except UnicodeDecodeError as error:
        raise UserError(f"{option}.path={path}: is not utf-8 text ({error.reason})") from error


def read_jsonl(path: Path, field: str, option: str) -> list[str]:
    """Read a JSON lines file: a document per line, in `field`. Raises UserError naming `option`."""
    documents = []
    text = read_plain(path, field, option)[0].removeprefix("\ufeff")  # a mark that some editors put before utf-8
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError, too
            raise UserError(f"{option}.path={path}: line {number} is not JSON ({error})") from error
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise _no_text(row, path, f"line {number}", field, option)
        documents.append(value)
    return documents


def _no_text(row: Any, path: Path, place: str, field: str, option: str) -> UserError:
    """The error of a row that has no string in `field`, with the fields that it does have."""
    if not isinstance(row, dict):
        return UserError(f'{option}.path={path}: {place} is not an object such as {{"{field}": "a text"}}')
    held = "is not in" if field not in row else "is null in" if row[field] is None else "is no string in"
    return UserError(f"{option}.field={field}: {held} {place} of {path}, whose fields are {', '.join(row) or 'none'}")


def read_parquet(path: Path, field: str, option: str) -> list[str]:
    """Read a parquet file: a document per row, in `field`. Raises UserError naming `option`."""
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(f"{option}.field={field}: {path} has the fields {', '.join(names)}")
        values = file.read([field])[field].to_pylist()
    except (pyarrow.lib.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{option}.path={path}: is not a parquet file that can be read ({reason})") from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise _no_text(dict.fromkeys(names) | {field: value}, path, f"row {number}", field, option)
    return values


READERS = {".txt": read_plain, ".text": read_plain, ".raw": read_plain, ".jsonl": read_jsonl, ".parquet": read_parquet}
