"""Text in: documents from local files or the Hugging Face hub, as plain strings in a fixed order."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matryoshka.config import digest
from matryoshka.errors import UserError

from .config import HarvestConfig

SUFFIXES = (".txt", ".jsonl", ".parquet")
_ENCODING = "utf-8-sig"
"""UTF-8, without the byte order mark that some editors put first."""
_GLOB_CHARACTERS = frozenset("*?[")


def documents(config: HarvestConfig) -> Iterator[str]:
    """Yield the documents of the dataset, empty ones left out.

    A .txt file is one document; .jsonl and .parquet have one in each row of the text column. Raises UserError when
    the dataset cannot be found, reached or read.
    """
    files = local_files(config.dataset)
    texts = _hub_documents(config) if files is None else _local_documents(files, config.text_column)
    return (_encodable(text) for text in texts if text.strip())


def dataset_facts(config: HarvestConfig) -> dict[str, Any]:
    """What the manifest says of the text; of local files a digest of names and sizes, so that a change shows."""
    facts: dict[str, Any] = {"name": config.dataset, "text_column": config.text_column}
    files = local_files(config.dataset)
    if files is None:
        return facts | {
            "config": config.dataset_config,
            "split": config.dataset_split,
            "revision": config.dataset_revision,
        }
    sizes = [[file.name, file.stat().st_size] for file in files]
    return facts | {"n_files": len(files), "n_bytes": sum(size for _, size in sizes), "files_digest": digest(sizes)}


def local_files(dataset: str) -> list[Path] | None:
    """The local files that `dataset` names, sorted, or None when it is the name of a hub dataset."""
    path = Path(dataset)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    elif _GLOB_CHARACTERS & set(dataset):
        found = sorted(Path(name) for name in glob.glob(dataset, recursive=True) if Path(name).is_file())
    elif path.suffix in SUFFIXES or dataset.startswith((".", "/", "~")):
        raise UserError(f"the dataset {dataset} does not exist; give a file, a folder, a glob or a hub dataset name")
    else:
        return None
    wrong = [file for file in found if file.suffix not in SUFFIXES]
    if wrong:
        raise UserError(f"the dataset file {wrong[0]} is none of {', '.join(SUFFIXES)}")
    if not found:
        raise UserError(f"the dataset {dataset} holds no {', '.join(SUFFIXES)} file")
    return found


def _local_documents(files: list[Path], column: str) -> Iterator[str]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for file in files:
        try:
            yield from readers[file.suffix](file, column)
        except (OSError, UnicodeDecodeError) as error:
            kind = "Parquet" if file.suffix == ".parquet" else "UTF-8 text"
            raise UserError(f"the dataset file {file} cannot be read as {kind}: {_one_line(error)}") from error


def _read_txt(file: Path, _column: str) -> Iterator[str]:
    yield file.read_text(encoding=_ENCODING)


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding=_ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number} is not JSON: {error}") from error
            yield _text_of(row, column, f"{file}, line {number}")


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                names = table.schema_arrow.names
                raise UserError(f"{file} has no column {column!r}, only {names}; set harvest.text_column")
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield from (_text_of(row, column, str(file)) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"the dataset file {file} cannot be read as Parquet: {_one_line(error)}") from error


def _hub_documents(config: HarvestConfig) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(
            config.dataset,
            config.dataset_config,
            split=config.dataset_split,
            revision=config.dataset_revision,
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


def _text_of(row: Any, column: str, where: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if isinstance(row, dict) and column in row and text is None:
        return ""  # a null is an empty document
    if not isinstance(text, str):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: no text in column {column!r}, found {found}; set harvest.text_column")
    return text


def _encodable(text: str) -> str:
    """The text with U+FFFD for half surrogate pairs, which JSON can spell but no tokenizer can take."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or "no message"
    return line if len(line) <= 300 else line[:297] + "..."
