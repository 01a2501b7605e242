"""Small shard sets and transcoders made by hand, without a language model. All sizes differ from one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.runs import publish_json
from matryoshka.shards import Manifest, ShardSet, ShardSetWriter, SiteFacts, SplitPlan
from matryoshka.shards.manifest import NormFacts
from matryoshka.sites import Norm
from matryoshka.transcoder import Transcoder, TranscoderConfig

D_IN, D_OUT = 12, 10
CTX_LEN = 8
GROUP_SIZES = (6, 11, 31)
MODEL = "google/gemma-2-2b"
BOS = 2
FACTS = {
    "source_hook": "blocks.1.hook_resid_mid",
    "target_hook": "blocks.1.hook_mlp_out",
    "model": MODEL,
    "model_revision": "abc",
}


def random_norm(d_in: int = D_IN) -> Norm:
    generator = torch.Generator().manual_seed(7)
    return Norm("rms", 1e-6, torch.rand(d_in, generator=generator) + 0.5)


def build_shards(
    path: Path,
    *,
    source: Callable[[Tensor], Tensor] | None = None,
    target: Callable[[Tensor], Tensor] | None = None,
    val_contexts: tuple[int, ...] = (5, 5, 3),
    d_in: int = D_IN,
    d_out: int = D_OUT,
    ctx_len: int = CTX_LEN,
    seed: int = 0,
) -> ShardSet:
    """A finished set: BOS at position 0 and one more special token (id 0) here and there.

    `source` maps random [..., d_in] to the source, `target` maps the source to the target; both are rounded to bf16.
    """
    generator = torch.Generator().manual_seed(seed)
    norm = random_norm(d_in)
    plans = {
        "train": SplitPlan(contexts=4, chunk_positions=4, shard_contexts=(4, 2)),
        "val": SplitPlan(contexts=max(val_contexts), chunk_positions=2, shard_contexts=val_contexts),
    }
    manifest = Manifest(
        model={"model": MODEL, "revision": "abc"},
        dataset={"name": "random"},
        source=SiteFacts(site="resid_mid", layer=1, hook_point="blocks.1.hook_resid_mid", width=d_in),
        target=SiteFacts(site="mlp_out", layer=1, hook_point="blocks.1.hook_mlp_out", width=d_out),
        ctx_len=ctx_len,
        bos_id=BOS,
        special_ids=(0, BOS),
        norm=NormFacts(kind=norm.kind, eps=norm.eps, has_bias=False),
        codec="raw",
        splits=plans,
        settings={"seed": seed},
        versions={},
    )
    writer = ShardSetWriter.open(path, manifest, norm)
    document = 0
    for split, plan in plans.items():
        for shard, n in enumerate(plan.shard_contexts):
            tokens = torch.randint(3, 40, (n, ctx_len), generator=generator, dtype=torch.int32)
            tokens[:, 0] = BOS
            tokens[0, ctx_len // 2] = 0
            doc_ids = torch.arange(n * ctx_len, dtype=torch.int32).view(n, ctx_len) // (ctx_len + 3) + document
            document = int(doc_ids.max()) + 1
            x = torch.randn(ctx_len, n, d_in, generator=generator)
            x = (x if source is None else source(x)).bfloat16()
            y = torch.randn(ctx_len, n, d_out, generator=generator) + 0.5 if target is None else target(x.float())
            writer.write_shard(split, shard, tokens, doc_ids, x, y.bfloat16())
    writer.finish()
    return ShardSet.open(path)


def random_transcoder(seed: int = 0, **changes: Any) -> Transcoder:
    """Random weights of unit-norm decoder rows, about a third of the latents active."""
    content: dict[str, Any] = {"d_in": D_IN, "d_out": D_OUT, "group_sizes": GROUP_SIZES, "k": 9, **FACTS, **changes}
    config = TranscoderConfig(**content)
    generator = torch.Generator().manual_seed(seed)
    transcoder = Transcoder(config)
    d_in, d_out, d_sae = config.d_in, config.d_out, config.d_sae
    weights = {
        "W_enc": torch.randn(d_in, d_sae, generator=generator) / d_in**0.5,
        "b_enc": torch.randn(d_sae, generator=generator) * 0.1,
        "W_dec": torch.nn.functional.normalize(torch.randn(d_sae, d_out, generator=generator), dim=1),
        "b_dec": torch.randn(d_out, generator=generator) * 0.3,
        "threshold": torch.rand(d_sae, generator=generator) - 0.1,
    }
    if config.skip:
        weights["W_skip"] = torch.randn(d_in, d_out, generator=generator) * 0.1
    transcoder.set_weights(weights)
    return transcoder


def save_run(path: Path, transcoder: Transcoder, *, steps: tuple[int, ...] = (100, 400), finished: bool = True) -> Path:
    """A run directory whose newest checkpoint holds `transcoder`; older ones hold other weights."""
    for step in steps:
        newest = step == max(steps)
        other = transcoder if newest else random_transcoder(seed=step, **transcoder.config.model_dump())
        folder = path / "checkpoints" / f"step-{step:06d}"
        other.save(folder)
        publish_json(folder / "state.json", {"format_version": 1, "step": step, "finished": newest and finished})
    publish_json(path / "run.json", {"format_version": 1})
    return path


def kept_rows(shards: ShardSet, limit: int | None = None) -> dict[str, Tensor]:
    """The slow twin of `row_batches`: every val row, one after the other, context after context."""
    rows: dict[str, list[Any]] = {name: [] for name in ("source", "target", "token", "doc", "position", "context")}
    context = 0
    for shard, n in enumerate(shards.val.shard_contexts):
        tokens, docs = shards.val.tokens(shard), shards.val.doc_ids(shard)
        source, target = (shards.val.activations(side, shard) for side in ("source", "target"))
        for c in range(n):
            for p in range(shards.ctx_len):
                if int(tokens[c, p]) in shards.manifest.special_ids:
                    continue
                values = (source[p, c], target[p, c], int(tokens[c, p]), int(docs[c, p]), p, context)
                for name, value in zip(rows, values, strict=True):
                    rows[name].append(value)
            context += 1
    return {
        name: (torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values))[:limit]
        for name, values in rows.items()
    }


class Made:
    """The makers above, for tests (which cannot import a conftest)."""

    shards = staticmethod(build_shards)
    transcoder = staticmethod(random_transcoder)
    run = staticmethod(save_run)
    kept_rows = staticmethod(kept_rows)
    norm = staticmethod(random_norm)
    d_in, d_out, ctx_len, group_sizes = D_IN, D_OUT, CTX_LEN, GROUP_SIZES
    facts = FACTS


@pytest.fixture(scope="session")
def made() -> type[Made]:
    """Makers of shard sets, transcoders and runs."""
    return Made


@pytest.fixture(scope="session")
def val_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set with 13 val contexts in 3 shards, the last of which is not full."""
    return build_shards(tmp_path_factory.mktemp("set") / "l1")
