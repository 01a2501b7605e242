"""`evaluate logits`: the direct effect of every latent on the logits, as a table on disk.

logits.parquet has a row a latent, side and rank, ordered by latent, raised before lowered, the strongest first: latent
int32, side int8 (1 raised, -1 lowered), rank int16 from 0, token int32, effect float32.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.runs import publish_bytes
from matryoshka.shards import ShardSet
from matryoshka.sites import hook_point
from matryoshka.tables import ResultTable

from ...analysis import Analysis, Job
from ...config import EvaluateConfig
from ...language_model.load import load_model, weight_dtype
from ...result import Result
from ...rows.context_blocks import count_contexts
from ...rows.contexts import context_batches
from .effects import TokenEffects, effect_tiles

LOGITS_FILE = "logits.parquet"
RAISED, LOWERED = 1, -1


class Logits(Result):
    """The content of logits.json. The shard set tells which language model."""

    FILE = "logits.json"
    TABLES = (LOGITS_FILE,)

    norm: Literal["rms", "layer"]
    """The final norm: its gain is folded in, and for a LayerNorm the mean of the row is taken off."""
    n_tokens: int
    """Tokens that were compared: those of the tokenizer."""
    scale: float | None = None
    """An `effect` times this is what the latent adds to the logit per unit of activation, before a soft cap, at the
    median position: the median of 1 / rms of the final residual, times what the model multiplies its logits with. Null
    where it was not measured (in files of before), or something unknown is done to the logits."""
    scale_rows: int | None = None
    """Held-out rows that the median is over."""
    soft_cap: float | None = None
    """The model's own on its logits, which no effect includes."""


@dataclass
class _Done:
    """What is done: the effects of the first latents, then the scales of the first contexts."""

    effects: TokenEffects
    scales: Float[Tensor, " rows"] = field(default_factory=lambda: torch.zeros(0))
    n_contexts: int = 0

    def __len__(self) -> int:
        return len(self.effects) + len(self.scales)


class LogitsAnalysis(Analysis[Logits]):
    """The tokens whose logits each latent raises and lowers most."""

    name = "logits"
    result = Logits
    # Neither the rows nor the prefix change what a latent does to the logits.
    apart = ()
    unit = "latents and rows"

    def asked(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:
        """The weights are rounded to this."""
        return {"dtype": weight_dtype(shards, config)}

    def make(self, job: Job) -> Logits:
        """Raises UserError for a language model whose logits are not made of a known norm and one matrix."""
        model = load_model(job.shards, job.config)
        unembedding = model.unembedding
        n_tokens = min(len(model.tokenizer), len(unembedding.W_U))
        top = min(job.config.logits.top, n_tokens)
        done = _Done(TokenEffects.empty(top))
        job.saved.load(done)
        W_dec = job.transcoder.W_dec.detach()
        job.progress.started(f"{job.name}: decoder rows", len(W_dec))
        job.progress.advanced(len(done.effects))
        for tile in effect_tiles(W_dec, unembedding, n_tokens, top, len(done.effects)):
            done.effects.extend(tile)
            job.progress.advanced(len(tile))
            job.saved.save_when_due(done, len(done))
        if unembedding.factor is not None:
            _measure_scales(model, job, done)
        write_logits(job.saved.folder / LOGITS_FILE, done.effects)
        return Logits(
            **job.facts,
            norm=unembedding.norm.kind,
            n_tokens=n_tokens,
            scale=float(np.median(done.scales.double().numpy())) if len(done.scales) else None,
            scale_rows=len(done.scales) or None,
            soft_cap=unembedding.soft_cap,
        )

    def tables(self, results: Sequence[Logits]) -> list[ResultTable]:  # noqa: ARG002 -- too long to be printed
        """None: there is a page for each latent."""
        return []


def _measure_scales(model: LanguageModel, job: Job, done: _Done) -> None:
    """The scale of the final norm at the rows that are not special of the first val contexts."""
    split, config = job.shards.val, job.config
    n_contexts, n_rows = count_contexts(split, config.logits.scale_tokens)
    last = hook_point("resid_post", model.n_layers - 1)
    job.progress.started(f"{job.name}: scale of the final norm", n_rows)
    job.progress.advanced(len(done.scales))
    for contexts in context_batches(job.shards, split, range(done.n_contexts, n_contexts), config.lm.batch_tokens):
        residual = model.capture(contexts.tokens, [last])[last]
        scales = model.unembedding.scales(residual).cpu()[contexts.replaced]
        done.scales = torch.cat([done.scales, scales])
        done.n_contexts += len(contexts.numbers)
        job.progress.advanced(len(scales))
        job.saved.save_when_due(done, len(done))


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


class LogitTokens:
    """logits.parquet of one run: per latent the tokens of each side, the strongest first."""

    def __init__(self, path: Path, d_sae: int) -> None:
        """Read `path`. Raises UserError when it is broken or not of `d_sae` latents."""
        import pyarrow.parquet as pq
        from pyarrow import ArrowInvalid

        try:
            table = pq.read_table(path, columns=["latent", "side", "rank", "token", "effect"])
        except (OSError, ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and run evaluate logits again") from error
        latent, side, rank, token, effect = (table[name].to_numpy() for name in table.column_names)
        if len(latent) and not 0 <= latent.min() <= latent.max() < d_sae:
            raise UserError(f"{path} is not of {d_sae} latents; delete it and run evaluate logits again")
        order = np.lexsort((rank, -side, latent))
        self._side, self._token, self._effect = side[order], token[order], effect[order]
        self._starts = np.searchsorted(latent[order], np.arange(d_sae + 1))
        self.d_sae = d_sae

    def of(self, latent: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """(token, effect) of the raised and of the lowered tokens, the strongest first."""
        rows = slice(self._starts[latent], self._starts[latent + 1])
        pairs = list(zip(self._token[rows].tolist(), self._effect[rows].tolist(), strict=True))
        n_raised = int((self._side[rows] > 0).sum())
        return pairs[:n_raised], pairs[n_raised:]
