"""Texts as lists of documents, read from plain, JSON lines and parquet files; WikiText's articles and line joining."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
    """Make a `Text` of these documents, with its hash."""
    documents = tuple(documents)
    digest = hashlib.sha256(joiner.join(documents).encode()).hexdigest()
    return Text(name, documents, source, digest, joiner)


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
    rows = []
    for line in read_plain(path, field, option)[0].split("\n"):
        try:
            rows.append(json.loads(line) if line.strip() else None)
        except json.JSONDecodeError as error:
            raise UserError(f"{option}.path={path}: line {len(rows) + 1} is not JSON ({error})") from error
    values = [row.get(field) if isinstance(row, dict) else None for row in rows if row is not None]
    return _all_text(values, path, field, option)


def read_parquet(path: Path, field: str, option: str) -> list[str]:
    """Read a parquet file: a document per row, in `field`. Raises UserError naming `option`."""
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.lib.ArrowInvalid as error:
        raise UserError(f"{option}.path={path}: is not a parquet file ({error})") from error
    if field not in file.schema_arrow.names:
        raise UserError(f"{option}.field={field}: {path} has the fields {', '.join(file.schema_arrow.names)}")
    return _all_text(file.read([field])[field].to_pylist(), path, field, option)


def _all_text(values: list, path: Path, field: str, option: str) -> list[str]:
    """Return the values if all are strings; otherwise raise UserError naming `option`."""
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise UserError(f"{option}.field={field}: row {number} of {path} has no text there")
    return values


READERS = {".txt": read_plain, ".text": read_plain, ".raw": read_plain, ".jsonl": read_jsonl, ".parquet": read_parquet}
