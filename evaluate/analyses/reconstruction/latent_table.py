"""latents.parquet: one row a latent."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from matryoshka.runs import publish_bytes
from matryoshka.transcoder import Transcoder

from ...measures.redundancy import Neighbours
from .latents import LatentSums
from .result import LATENTS_FILE


def write_latents(folder: Path, transcoder: Transcoder, sums: LatentSums, neighbours: Neighbours) -> Path:
    """Publish the table; the same numbers give the same bytes.

    Columns: latent, group (from 1), n_rows it fired on, density, mean_act over the rows where it fires and max_act
    (both null where it never fires), threshold, b_enc, W_enc_norm, W_dec_norm, enc_dec_cosine (null where the widths
    differ), max_cosine and nearest_latent (decoder neighbour).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = transcoder.config
    sizes = torch.tensor(config.group_sizes)
    weights = {name: parameter.detach().float().cpu() for name, parameter in transcoder.named_parameters()}
    fired = sums.firing.counts > 0
    silent = (~fired).numpy()
    columns = {
        "latent": pa.array(torch.arange(config.d_sae, dtype=torch.int32).numpy()),
        "group": pa.array(torch.repeat_interleave(torch.arange(len(sizes)) + 1, sizes).to(torch.int16).numpy()),
        "n_rows": pa.array(sums.firing.counts.numpy()),
        "density": pa.array(sums.firing.density().numpy()),
        "mean_act": pa.array(sums.mean_when_active().numpy(), mask=silent),
        "max_act": pa.array(sums.largest.numpy(), mask=silent),
        "threshold": pa.array(weights["threshold"].numpy()),
        "b_enc": pa.array(weights["b_enc"].numpy()),
        "W_enc_norm": pa.array(weights["W_enc"].norm(dim=0).numpy()),
        "W_dec_norm": pa.array(weights["W_dec"].norm(dim=1).numpy()),
        "enc_dec_cosine": _enc_dec_cosine(weights["W_enc"], weights["W_dec"]),
        "max_cosine": pa.array(neighbours.cosine.numpy(), mask=neighbours.cosine.isnan().numpy()),
        "nearest_latent": pa.array(neighbours.latent.to(torch.int32).numpy(), mask=(neighbours.latent < 0).numpy()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    publish_bytes(folder / LATENTS_FILE, buffer.getvalue())
    return folder / LATENTS_FILE


def _enc_dec_cosine(W_enc: torch.Tensor, W_dec: torch.Tensor) -> object:
    import pyarrow as pa

    if W_enc.shape[0] != W_dec.shape[1]:
        return pa.nulls(len(W_dec), pa.float32())
    return pa.array(torch.nn.functional.cosine_similarity(W_enc.T, W_dec, dim=1).numpy())
