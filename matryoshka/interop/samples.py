"""The examples that `evaluate samples` made of a run, as formats of others take them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka.config import digest
from matryoshka.errors import UserError
from matryoshka.interop.logit_effects import MARK_FILE as LOGITS_MARK
from matryoshka.interop.logit_effects import LogitEffects
from matryoshka.interop.weight_files import read_json_object
from matryoshka.tokens import TokenTexts

MARK_FILE, WINDOWS_FILE, HISTOGRAMS_FILE = "samples.json", "samples.parquet", "histograms.parquet"

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Samples:
    """A folder samples/ that `evaluate samples` made."""

    folder: Path
    weights_sha256: str
    """Of the transcoder.safetensors that the samples are of."""
    tokenizer: str
    model_revision: str | None
    n_rows: int
    """Rows the examples are chosen from."""
    digest: str
    """Of the marks, which say what decides every byte of the samples and of the logit effects."""
    logits: LogitEffects | None = None
    """Of the same weights, where they were made."""

    @classmethod
    def open(cls, folder: Path) -> Samples:
        """Raises UserError when it is not there whole, or is of another version."""
        if not (folder / MARK_FILE).is_file():
            raise UserError(f"{folder} holds no samples; make them with: evaluate samples RUN")
        mark = read_json_object(folder / MARK_FILE)
        if mark.get("format_version") != _FORMAT_VERSION:
            raise UserError(f"{folder} has format_version {mark.get('format_version')!r}; this version reads 1")
        sha256 = mark["transcoder"]["sha256"]
        logits = LogitEffects.open(folder.parent, sha256)
        marks = mark if logits is None else {**mark, "logits": read_json_object(folder.parent / LOGITS_MARK)}
        return cls(
            folder,
            sha256,
            mark["tokenizer"],
            mark["shard_set"]["model_revision"],
            mark["n_rows"],
            digest(marks),
            logits,
        )

    def with_tokenizer(self, tokenizer: str) -> Samples:
        """The same, with the texts of another tokenizer (a folder or hub name): what is made of it differs."""
        return replace(self, tokenizer=tokenizer, model_revision=None, digest=digest([self.digest, tokenizer]))

    def token_texts(self) -> TokenTexts:
        """The vocabulary; raises UserError when it is not available."""
        return TokenTexts.read(self.tokenizer, revision=self.model_revision, near=self.folder)

    def windows(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(latent, its windows) in rising order of the latents that have some."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.folder / WINDOWS_FILE)
        rows = (row for group in range(file.num_row_groups) for row in file.read_row_group(group).to_pylist())
        for latent, own in itertools.groupby(rows, key=lambda row: row["latent"]):
            yield latent, list(own)

    def histograms(self) -> list[dict[str, Any]]:
        """n_rows, width and counts of each latent."""
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / HISTOGRAMS_FILE).to_pylist()
