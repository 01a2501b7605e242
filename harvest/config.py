"""Settings of a harvest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from matryoshka.config import Config, Count
from matryoshka.errors import UserError
from matryoshka.runs import default_shards_path
from matryoshka.sites import HookPair, Site

_OPERATIONAL = frozenset({"out", "batch_size", "device"})


class HarvestConfig(Config):
    """What to read, with which model, and what to keep of it."""

    model: str = "google/gemma-2-2b"
    """Language model: a Hugging Face hub name or a local folder in the Hugging Face layout."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub; the commit it resolves to is recorded."""
    dataset: str = "monology/pile-uncopyrighted"
    """Text: a Hugging Face dataset name, or a local .txt, .jsonl or .parquet file, a folder of them, or a glob."""
    dataset_config: str | None = None
    """Configuration of a hub dataset, such as sample-10BT."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub dataset; pin it to be able to repeat a harvest."""
    text_column: str = "text"
    """Column (jsonl, parquet, hub) that holds the text."""
    layer: Annotated[int, Field(ge=0)]
    """Block of the language model, counted from 0."""
    source_site: str = "resid_mid"
    """What the transcoder will read."""
    target_site: str = "mlp_out"
    """What the transcoder will predict."""
    tokens: Count = 15_000_000
    """Tokens to run through the model, train and val together; 15M is read too."""
    ctx_len: Annotated[Count, Field(ge=2)] = 1024
    """Tokens in one model input, the BOS token included."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the text held out for evaluation, by a hash of each document."""
    batch_size: Count = 8
    """Contexts in one forward pass; does not change the result beyond rounding."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Weights and arithmetic of the model; auto is bf16 where the device has it."""
    codec: Literal["compact", "raw"] = "compact"
    """compact: lossless, about 0.70 of raw bfloat16. raw: fastest to read."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the train/val split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    out: Path | None = None
    """Folder of the shard set; data/l<layer> by default."""

    @model_validator(mode="after")
    def _check(self) -> HarvestConfig:
        try:
            self.pair()
        except UserError as error:
            raise ValueError(str(error)) from error
        if self.tokens < 2 * self.ctx_len:
            raise ValueError(
                f"tokens = {self.tokens} is less than two contexts of ctx_len = {self.ctx_len}; a set needs at least "
                "one for train and one for val"
            )
        return self

    def pair(self) -> HookPair:
        """The source and target sites."""
        return HookPair(Site(self.source_site, self.layer), Site(self.target_site, self.layer))

    def folder(self) -> Path:
        """Where the shard set lies."""
        return self.out if self.out is not None else default_shards_path(self.layer)

    def content(self) -> dict[str, Any]:
        """The settings that decide what is written; the others only how fast and where."""
        return self.model_dump(mode="json", exclude=set(_OPERATIONAL))
