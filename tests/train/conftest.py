"""Small shard sets made from given rows, without a language model; and the start of several ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from warm_processes import WarmPython

from matryoshka.norms import Norm
from matryoshka.shards import Manifest, ShardSet, ShardSetWriter, SiteFacts, plan_splits
from matryoshka.shards.manifest import NormFacts

BOS = 2
CTX_LEN = 16

MakeShards = Callable[..., ShardSet]
TrainOnRanks = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """source [rows, d_in], target [rows, d_out] -> a finished set whose non-BOS positions hold these rows in order."""

    def make(
        source: Tensor, target: Tensor, *, norm: Norm | None = None, val_fraction: float = 0.2, codec: str = "compact"
    ) -> ShardSet:
        path = tmp_path_factory.mktemp("shards") / "l3"
        per_context = CTX_LEN - 1
        n_contexts = len(source) // per_context
        splits = plan_splits(n_contexts, val_fraction, CTX_LEN, max(source.shape[1], target.shape[1]))
        facts = None if norm is None else NormFacts(kind=norm.kind, eps=norm.eps, has_bias=norm.bias is not None)
        manifest = Manifest(
            model={"model": "planted", "revision": None},
            dataset={"name": "none"},
            source=SiteFacts(site="resid_mid", layer=3, hook_point="blocks.3.hook_resid_mid", width=source.shape[1]),
            target=SiteFacts(site="mlp_out", layer=3, hook_point="blocks.3.hook_mlp_out", width=target.shape[1]),
            ctx_len=CTX_LEN,
            bos_id=BOS,
            special_ids=(0, 1, BOS),
            norm=facts,
            codec=codec,
            splits=splits,
            settings={},
            versions={},
        )
        writer = ShardSetWriter.open(path, manifest, norm)
        first = 0
        for split, plan in splits.items():
            for shard, n in enumerate(plan.shard_contexts):
                rows = slice(first * per_context, (first + n) * per_context)
                tokens = torch.randint(4, 90, (n, CTX_LEN), generator=torch.Generator().manual_seed(first))
                tokens[:, 0] = BOS
                doc_ids = (torch.arange(first, first + n) // 2)[:, None].expand(n, CTX_LEN)
                sides = []
                for values in (source, target):
                    contexts = values[rows].reshape(n, per_context, -1)
                    # BOS rows are huge, as attention sinks are: anything that lets one in will show it.
                    contexts = torch.cat([torch.full_like(contexts[:, :1], 1e4), contexts], dim=1)
                    sides.append(contexts.transpose(0, 1).bfloat16().contiguous())
                writer.write_shard(split, shard, tokens.int(), doc_ids.int().contiguous(), sides[0], sides[1])
                first += n
        writer.finish()
        return ShardSet.open(path)

    return make


@pytest.fixture(scope="session")
def random_shards(make_shards: MakeShards) -> ShardSet:
    """About 2700 train rows at d_in = 12, d_out = 10, with a norm."""
    g = torch.Generator().manual_seed(0)
    source = torch.randn(15 * 230, 12, generator=g) * torch.linspace(0.5, 2, 12) + torch.linspace(-1, 1, 12)
    target = torch.relu(source @ torch.randn(12, 10, generator=g)) + 0.1 * torch.randn(15 * 230, 10, generator=g)
    norm = Norm(kind="rms", eps=1e-6, gain=torch.linspace(0.5, 1.5, 12), bias=None)
    return make_shards(source, target, norm=norm)


@pytest.fixture
def run_settings(random_shards: ShardSet) -> dict[str, Any]:
    """A small run of 24 steps that logs every third and saves every seventh."""
    return {
        "shards": str(random_shards.path),
        "group_sizes": (8, 16, 24),
        "k": 4,
        "steps": 24,
        "batch_tokens": 128,
        "buffer_tokens": 1024,
        "lr": 3e-3,
        "checkpoint_every": 7,
        "log_every": 3,
        "device": "cpu",
    }


@pytest.fixture
def train_on_ranks(warm_python: WarmPython, tmp_path: Path) -> TrainOnRanks:
    """`train run` with these settings, "parallel" among them, in so many processes; `torchrun`: by torchrun itself."""

    def run(settings: dict[str, Any], world: int, torchrun: bool = False) -> None:
        config = tmp_path / "p.yaml"
        config.write_text(json.dumps({"train": settings}))
        words = ["-m", "train", "run", "--config", str(config), "--parallel", settings["parallel"]]
        if not torchrun:
            warm_python.run_ranks(words, ROOT, world)
            return
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        done = subprocess.run([*launcher, *words], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def step_on_ranks(warm_python: WarmPython, tmp_path: Path) -> Callable[[str, int], None]:
    """A script in so many processes; it finds the checkout and tests/train/step in its first two arguments."""

    def run(script: str, world: int) -> None:
        driver = tmp_path / "driver.py"
        driver.write_text(script)
        warm_python.run_ranks([driver, ROOT, Path(__file__).parent / "step"], ROOT, world)

    return run
