"""Which local files a dataset setting names, and of which kinds."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from matryoshka.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Kinds of files; the first two may also be compressed: .txt.gz, .jsonl.zst."""
COMPRESSED = (".gz", ".zst")
_GLOB_CHARACTERS = frozenset("*?[")
_CHECKSUMS = re.compile(r"(md5|sha\d*|b2|check)[-_]?sums?\.txt", re.IGNORECASE)
"""Lists of checksums, which come with many downloads and are no text."""


def local_files(dataset: str) -> list[Path] | None:
    """The local files that `dataset` names, sorted, or None when it is the name of a hub dataset.

    Of a folder, the text files in it and in all folders below, links included; lists of checksums and what is hidden
    are left out.
    """
    path = Path(dataset)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(_text_files(path))
    elif _GLOB_CHARACTERS & set(dataset):
        found = sorted(Path(name) for name in glob.glob(dataset, recursive=True) if Path(name).is_file())
    elif kind_of(path) in SUFFIXES or dataset.startswith((".", "/", "~")):
        raise UserError(f"the dataset {dataset} does not exist; give a file, a folder, a glob or a hub dataset name")
    else:
        return None
    wrong = [file for file in found if kind_of(file) not in SUFFIXES]
    if wrong:
        raise UserError(
            f"the dataset file {wrong[0]} is none of {', '.join(SUFFIXES)} (nor .txt or .jsonl in .gz, .zst)"
        )
    if not found:
        raise UserError(f"the dataset {dataset} holds no {', '.join(SUFFIXES)} file")
    return found


def kind_of(file: Path) -> str:
    """The suffix that says how to read a file, whether or not it is compressed; Parquet compresses by itself."""
    inner = file.with_suffix("").suffix
    return inner if file.suffix in COMPRESSED and inner in (".txt", ".jsonl") else file.suffix


def describe_files(dataset: str, files: Sequence[Path]) -> str:
    """How many files of which kind are read, as one line."""
    kinds = Counter(kind_of(file) for file in files)
    parts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"text: {len(files):,} {'file' if len(files) == 1 else 'files'} of {dataset} ({parts})"


def _text_files(folder: Path) -> Iterator[Path]:
    """Each folder once, however many links lead to it: a link may lead to a folder that it is in."""
    entered: set[tuple[int, int]] = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        facts = os.stat(name)
        if (facts.st_dev, facts.st_ino) in entered:
            folders.clear()
            continue
        entered.add((facts.st_dev, facts.st_ino))
        # Sorted, so that which of two ways to one folder is taken does not depend on the disk.
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for one in files:
            file = Path(name, one)
            left_out = one.startswith(".") or _CHECKSUMS.fullmatch(one)
            if kind_of(file) in SUFFIXES and not left_out and file.is_file():
                yield file
