"""`evaluate logits`: the direct effect of every latent on the logits, as a table on disk.

logits.parquet has a row a latent, side and rank, ordered by latent, raised before lowered, the strongest first: latent
int32, side int8 (1 raised, -1 lowered), rank int16 from 0, token int32, effect float32.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka.runs import publish_bytes
from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable

from ..analysis import Analysis, Job
from ..config import EvaluateConfig
from ..result import Result
from .logit_effects import TokenEffects, token_effects
from .model import load_model, weight_dtype

LOGITS_FILE = "logits.parquet"
RAISED, LOWERED = 1, -1


class Logits(Result):
    """The content of logits.json. The shard set tells which language model; none of its rows are read."""

    FILE = "logits.json"
    TABLES = (LOGITS_FILE,)

    norm: Literal["rms", "layer"]
    """The final norm: its gain is folded in, and for a LayerNorm the mean of the row is taken off."""
    n_tokens: int
    """Tokens that were compared: those of the tokenizer."""


class LogitsAnalysis(Analysis[Logits]):
    """The tokens whose logits each latent raises and lowers most."""

    name = "logits"
    result = Logits
    # Neither the rows nor the prefix change what a latent does to the logits.
    apart = ()

    def asked(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:
        """The weights are rounded to this."""
        return {"dtype": weight_dtype(shards, config)}

    def make(self, job: Job) -> Logits:
        """Raises UserError for a language model whose logits are not made of a known norm and one matrix."""
        model = load_model(job.shards, job.config)
        unembedding = model.unembedding
        n_tokens = min(len(model.tokenizer), len(unembedding.W_U))
        effects = token_effects(job.transcoder.W_dec, unembedding, n_tokens, job.config.logits.top)
        write_logits(job.saved.folder / LOGITS_FILE, effects)
        return Logits(**job.facts, norm=unembedding.norm.kind, n_tokens=n_tokens)

    def tables(self, results: Sequence[Logits]) -> list[ResultTable]:  # noqa: ARG002 -- too long to be printed
        """None: there is a page for each latent."""
        return []


def write_logits(path: Path, effects: TokenEffects) -> None:
    """Publish logits.parquet; equal effects give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    publish_bytes(path, buffer.getvalue())
