"""logits.parquet (a row a latent, side and rank) and logits.json, its mark, which is written last."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from matryoshka.config import Config
from matryoshka.runs import publish_bytes, publish_json

from ..result import ShardSetFacts, TranscoderFacts, identity_of
from .logit_effects import TokenEffects

LOGITS_FILE, MARK_FILE = "logits.parquet", "logits.json"
RAISED, LOWERED = 1, -1


class LogitsMark(Config):
    """The content of logits.json."""

    format_version: Literal[1] = 1
    transcoder: TranscoderFacts
    shard_set: ShardSetFacts
    settings: dict[str, Any]
    norm: Literal["rms", "layer"]
    """The final norm: its gain is folded in, and for a LayerNorm the mean of the row is taken off."""
    n_tokens: int
    """Tokens that were compared: those of the tokenizer."""

    def identity(self) -> dict[str, Any]:
        """What decides every byte of the table."""
        return logits_identity(self.transcoder, self.shard_set, self.settings)


def logits_identity(transcoder: TranscoderFacts, shard_set: ShardSetFacts, settings: dict[str, Any]) -> dict[str, Any]:
    """The weights of both models: the shard set stands for the language model's."""
    return identity_of(transcoder, shard_set, settings)


def write_logits(folder: Path, mark: LogitsMark, effects: TokenEffects) -> Path:
    """Publish both files; equal content gives equal bytes.

    Columns: latent int32, side int8 (1 raised, -1 lowered), rank int16 from 0, token int32, effect float32; ordered by
    latent, raised before lowered, the strongest first.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / MARK_FILE).unlink(missing_ok=True)
    n_latents, top = effects.raised.shape
    latent, side, rank = (
        torch.arange(n_latents).repeat_interleave(2 * top),
        torch.tensor([RAISED, LOWERED]).repeat_interleave(top).repeat(n_latents),
        torch.arange(top).repeat(2 * n_latents),
    )
    columns = {
        "latent": pa.array(latent.int().numpy()),
        "side": pa.array(side.to(torch.int8).numpy()),
        "rank": pa.array(rank.to(torch.int16).numpy()),
        "token": pa.array(torch.stack([effects.raised, effects.lowered], 1).flatten().int().numpy()),
        "effect": pa.array(torch.stack([effects.raised_by, effects.lowered_by], 1).flatten().float().numpy()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    publish_bytes(folder / LOGITS_FILE, buffer.getvalue())
    publish_json(folder / MARK_FILE, mark.model_dump(mode="json"))
    return folder / LOGITS_FILE


def read_logits_mark(folder: Path) -> LogitsMark | None:
    """The mark in `folder`; None when there is none that this version can read."""
    try:
        return LogitsMark.model_validate_json((folder / MARK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
