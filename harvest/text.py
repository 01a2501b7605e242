"""Text in: documents from local files or the Hugging Face hub, as plain strings in a fixed order."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from matryoshka.config import digest
from matryoshka.errors import UserError

from .config import HarvestConfig
from .text_files import COMPRESSED, kind_of, local_files

_ENCODING = "utf-8-sig"
"""UTF-8, without the byte order mark that some editors put first."""


class BadLines:
    """Broken lines of jsonl that were left out; each counts once, however often the text is read."""

    def __init__(self) -> None:
        self._lines: dict[str, set[int]] = {}

    def add(self, file: Path, number: int) -> None:
        """Note the line of this number."""
        self._lines.setdefault(str(file), set()).add(number)

    def counts(self) -> dict[str, int]:
        """File -> how many."""
        return {file: len(numbers) for file, numbers in sorted(self._lines.items())}


def documents(
    config: HarvestConfig, facts: dict[str, Any] | None = None, bad_lines: BadLines | None = None
) -> Iterator[str]:
    """Yield the documents of the dataset, empty ones left out, and with `dedup` those whose text has come before.

    A .txt file is one document; .jsonl and .parquet have one in each row of the text column. `facts` are those of
    `dataset_facts`: of a hub dataset they name the very commit to read. With `skip_bad_lines`, lines that are left out
    are noted in `bad_lines`. Raises UserError when the dataset cannot be
    found, reached or read.
    """
    files = local_files(config.dataset)
    commit = (facts or {}).get("commit") or config.dataset_revision
    skipped = (bad_lines or BadLines()) if config.skip_bad_lines else None
    texts = _hub_documents(config, commit) if files is None else _local_documents(files, config.text_column, skipped)
    found = (_encodable(text) for text in texts if text.strip())
    return _distinct(found) if config.dedup else found


def dataset_facts(config: HarvestConfig, begun: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the manifest says of the text; of local files a digest of names and sizes, so that a change shows.

    A hub dataset is resolved to its commit, if the hub can be asked; a set that was `begun` keeps to its own.
    """
    facts: dict[str, Any] = {"name": config.dataset, "text_column": config.text_column}
    files = local_files(config.dataset)
    if files is None:
        facts |= {
            "config": config.dataset_config,
            "split": config.dataset_split,
            "revision": config.dataset_revision,
        }
        if begun is not None:
            return facts | ({"commit": begun["commit"]} if "commit" in begun else {})
        return facts | {"commit": _commit_of(config.dataset, config.dataset_revision)}
    sizes = [[file.name, file.stat().st_size] for file in files]
    return facts | {"n_files": len(files), "n_bytes": sum(size for _, size in sizes), "files_digest": digest(sizes)}


def _local_documents(files: list[Path], column: str, skipped: BadLines | None) -> Iterator[str]:
    for file in files:
        kind = kind_of(file)
        try:
            if kind == ".txt":
                yield from _read_txt(file)
            elif kind == ".jsonl":
                yield from _read_jsonl(file, column, skipped)
            else:
                yield from _read_parquet(file, column)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            name = "Parquet" if kind == ".parquet" else "UTF-8 text"
            packed = f" in {file.suffix}" if file.suffix in COMPRESSED else ""
            raise UserError(f"the dataset file {file} cannot be read as {name}{packed}: {_one_line(error)}") from error


@contextmanager
def _opened(file: Path, errors: str = "strict") -> Iterator[TextIO]:
    if file.suffix == ".gz":
        with gzip.open(file, "rt", encoding=_ENCODING, errors=errors) as text:
            yield text
    elif file.suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(file), compression="zstd") as stream:
            yield io.TextIOWrapper(stream, encoding=_ENCODING, errors=errors)
    else:
        with file.open(encoding=_ENCODING, errors=errors) as text:
            yield text


def _read_txt(file: Path) -> Iterator[str]:
    with _opened(file) as text:
        yield text.read()


def _read_jsonl(file: Path, column: str, skipped: BadLines | None) -> Iterator[str]:
    # Bytes that are no UTF-8 come as lone surrogates, so that they break their own line alone.
    with _opened(file, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                line.encode()
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if skipped is not None:
                    skipped.add(file, number)
                    continue
                kind = "UTF-8 text" if isinstance(error, UnicodeError) else "JSON"
                raise UserError(
                    f"{file}, line {number} is not {kind}: {_one_line(error)}. Fix the line and run the same command "
                    "again, or leave such lines out with --skip-bad-lines"
                ) from error
            yield _text_of(row, column, f"{file}, line {number}")


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names and not _has_field(table.schema_arrow, column):
                raise UserError(f"{file} has no column {column!r}, only {names}; set harvest.text_column")
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield from (_text_of(row, column, str(file)) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"the dataset file {file} cannot be read as Parquet: {_one_line(error)}") from error


def _has_field(schema: Any, column: str) -> bool:
    """Whether an Arrow schema has a nested column such as meta.text, which pyarrow reads by that name."""
    import pyarrow

    fields: Any = schema
    for name in column.split("."):
        if fields.get_field_index(name) < 0:
            return False
        fields = fields.field(name).type
        if not pyarrow.types.is_struct(fields):
            return name == column.rsplit(".", 1)[-1]
    return True


def _commit_of(dataset: str, revision: str | None) -> str | None:
    """The commit that a hub dataset's branch or tag is at, or None where the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except Exception:  # whatever is wrong, reading the dataset says it better, and a mirror may know only the data
        return None


def _hub_documents(config: HarvestConfig, revision: str | None) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(
            config.dataset,
            config.dataset_config,
            split=config.dataset_split,
            revision=revision,
            streaming=True,
        )
        for row in rows:
            yield _text_of(row, config.text_column, f"dataset {config.dataset}")
    except UserError:
        raise
    except Exception as error:  # the hub client raises dozens of unrelated types for "cannot have it"
        raise UserError(
            f"the dataset {config.dataset!r} could not be read from the Hugging Face hub "
            f"({type(error).__name__}: {_one_line(error)}). Check the name, the network and, for a gated dataset, "
            "the token (set HF_TOKEN, or run: hf auth login), or give a local file, folder or glob with --dataset"
        ) from error


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        # 8 bytes: among 10 million documents two different ones collide with probability 3e-6.
        document = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if document not in seen:
            seen.add(document)
            yield text


def _text_of(row: Any, column: str, where: str) -> str:
    """The text in a row; `meta.text` is the text inside meta, unless there is a column of that whole name."""
    value, path = row, [column] if isinstance(row, dict) and column in row else column.split(".")
    for name in path:
        if not isinstance(value, dict) or name not in value:
            found = sorted(map(str, value)) if isinstance(value, dict) else _type_of(value)
            raise UserError(f"{where}: no text in column {column!r}, found {found}; set harvest.text_column")
        value = value[name]
        if value is None:
            return ""  # a null is an empty document
    if not isinstance(value, str):
        raise UserError(
            f"{where}: no text in column {column!r}, it holds {_type_of(value)}; set harvest.text_column to one of text"
        )
    return value


def _type_of(value: Any) -> str:
    """What is there in place of text, in words."""
    if isinstance(value, dict):
        return f"an object with {sorted(map(str, value))}, to be named as in meta.text"
    if isinstance(value, list):
        return f"a list of {len(value)} ({', '.join(sorted({type(one).__name__ for one in value})) or 'empty'})"
    return {bytes: "bytes", bool: "a truth value", int: "a number (int)", float: "a number (float)"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _encodable(text: str) -> str:
    """The text with U+FFFD for half surrogate pairs, which JSON can spell but no tokenizer can take."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or "no message"
    return line if len(line) <= 300 else line[:297] + "..."
