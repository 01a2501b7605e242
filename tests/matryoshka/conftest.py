"""A toy shard set of random activations (unequal widths, special tokens, a last shard with fewer contexts), random
transcoders, and language models loaded once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.lm import LanguageModel
from matryoshka.norms import Norm
from matryoshka.shards import Manifest, ShardSetWriter, SiteFacts, plan_splits
from matryoshka.shards.manifest import NormFacts
from matryoshka.transcoder import Transcoder, TranscoderConfig

D_IN, D_OUT, CTX_LEN = 12, 10, 6
N_CONTEXTS = 20  # 3 for val; the 17 of train fill 8 shards of 2 and one of 1

Piece = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class ToySet:
    """What a set should hold, and how to write it."""

    manifest: Manifest
    norm: Norm | None
    pieces: dict[tuple[str, int], Piece] = field(default_factory=dict)
    """(split, shard) -> tokens, doc_ids, source, target as `write_shard` takes them."""

    def write_shards(self, writer: ShardSetWriter, n_shards: int | None = None) -> None:
        """Write what is not committed yet, or the first `n_shards` pieces of it."""
        for (split, shard), piece in itertools.islice(self.pieces.items(), n_shards):
            if not writer.is_committed(split, shard):
                writer.write_shard(split, shard, *piece)

    def write(self, path: Path) -> Path:
        """Write the whole set to `path`, or what is missing there."""
        writer = ShardSetWriter.open(path, self.manifest, self.norm)
        self.write_shards(writer)
        writer.finish()
        return path

    def kept_rows(self, side: str) -> Tensor:
        """All rows of the train split without special tokens, [rows, width] float64, by plain loops."""
        rows = []
        for (split, _), (tokens, _, source, target) in self.pieces.items():
            if split != "train":
                continue
            values = source if side == "source" else target
            for position in range(values.shape[0]):
                for context in range(values.shape[1]):
                    if int(tokens[context, position]) not in self.manifest.special_ids:
                        rows.append(values[position, context].double())
        return torch.stack(rows)


def make_toy(
    codec: str = "compact", *, norm: str | None = "layer", seed: int = 0, val_fraction: float = 0.15
) -> ToySet:
    """A toy set; `norm` is the kind of norm behind its source."""
    generator = torch.Generator().manual_seed(seed)
    facts = None if norm is None else NormFacts(kind=norm, eps=1e-5, has_bias=norm == "layer")  # type: ignore[arg-type]
    the_norm = None
    if norm is not None:
        gain = torch.rand(D_IN, generator=generator) + 0.5
        bias = torch.randn(D_IN, generator=generator) if norm == "layer" else None
        the_norm = Norm(kind=norm, eps=1e-5, gain=gain, bias=bias)  # type: ignore[arg-type]
    manifest = Manifest(
        model={"model": "toy", "revision": None},
        dataset={"name": "toy text"},
        source=SiteFacts(site="resid_mid", layer=1, hook_point="blocks.1.hook_resid_mid", width=D_IN),
        target=SiteFacts(site="mlp_out", layer=1, hook_point="blocks.1.hook_mlp_out", width=D_OUT),
        ctx_len=CTX_LEN,
        bos_id=0,
        special_ids=(0, 3),
        norm=facts,
        codec=codec,
        splits=plan_splits(N_CONTEXTS, val_fraction, CTX_LEN, D_IN),
        settings={"layer": 1, "tokens": N_CONTEXTS * CTX_LEN, "seed": seed},
        versions={"numpy": "2"},
    )
    toy = ToySet(manifest, the_norm)
    for split, plan in manifest.splits.items():
        for shard, n in enumerate(plan.shard_contexts):
            tokens = torch.randint(1, 50, (n, CTX_LEN), generator=generator, dtype=torch.int32)
            tokens[:, 0] = 0
            tokens[0, 4] = 3  # a special token inside a context
            doc_ids = torch.randint(9, (n, CTX_LEN), generator=generator, dtype=torch.int32)
            # Offset and scaled per dimension, so that means and variances differ from 0 and 1.
            source = torch.randn(CTX_LEN, n, D_IN, generator=generator) * torch.arange(1, D_IN + 1) + 5
            target = torch.randn(CTX_LEN, n, D_OUT, generator=generator) - torch.arange(D_OUT)
            toy.pieces[split, shard] = (tokens, doc_ids, source.bfloat16(), target.bfloat16())
    return toy


@pytest.fixture(scope="session")
def toy() -> ToySet:
    """What the set at `toy_path` holds."""
    return make_toy()


@pytest.fixture(scope="session")
def toy_path(toy: ToySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set; tests that damage one make a copy."""
    return toy.write(tmp_path_factory.mktemp("toy") / "l1")


@pytest.fixture(name="make_toy")
def make_toy_fixture():  # noqa: ANN201
    """`make_toy`, since test modules cannot import this file."""
    return make_toy


def make_transcoder(seed: int = 0, scale: float = 1.0, **changes: Any) -> Transcoder:
    """Normal weights times `scale`, for the MLP of layer 3 of Gemma-2 but small; `changes` are fields of its config."""
    content: dict[str, Any] = {
        "d_in": D_IN,
        "d_out": D_OUT,
        "group_sizes": (5, 11),
        "k": 4,
        "input": "normalized",
        "source_hook": "blocks.3.hook_resid_mid",
        "target_hook": "blocks.3.hook_mlp_out",
        "model": "google/gemma-2-2b",
        **changes,
    }
    transcoder = Transcoder(TranscoderConfig(**content))
    generator = torch.Generator().manual_seed(seed)
    transcoder.set_weights(
        {name: torch.randn(p.shape, generator=generator) * scale for name, p in transcoder.named_parameters()}
    )
    return transcoder


@pytest.fixture(name="make_transcoder")
def make_transcoder_fixture() -> Callable[..., Transcoder]:
    """`make_transcoder`."""
    return make_transcoder


@pytest.fixture(scope="module")
def load(request: pytest.FixtureRequest) -> Callable[..., LanguageModel]:
    """A function (name of a fixture that is a model's folder, dtype) -> the model, loaded once per test module."""
    models: dict[tuple[str, str], LanguageModel] = {}

    def get(name: str, dtype: str = "float32") -> LanguageModel:
        if (name, dtype) not in models:
            models[name, dtype] = LanguageModel.load(str(request.getfixturevalue(name)), dtype=dtype, device="cpu")
        return models[name, dtype]

    return get


@pytest.fixture(scope="session")
def boot_bridge() -> Callable[[Path], Any]:
    """A function: folder of a model -> a TransformerBridge of TransformerLens over its weights in float32."""

    def boot(folder: Path) -> Any:
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # TransformerLens loads a tokenizer a second time unless it claims to prepend BOS already.
        tokenizer.init_kwargs["add_bos_token"] = True
        return TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer, device="cpu")

    return boot
