"""Tiny language models with a shard set of their own activations and a random transcoder of one of their layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluate.config import EvaluateConfig
from matryoshka.lm import LanguageModel
from matryoshka.shards import Manifest, ShardSet, ShardSetWriter, SiteFacts, SplitPlan
from matryoshka.shards.manifest import NormFacts
from matryoshka.transcoder import Transcoder

LAYER, CTX_LEN = 1, 13
GROUP_SIZES = (5, 9, 17)
SHARD_CONTEXTS = {"train": (3, 1), "val": (3, 3, 2)}
N_TOKENS = 94
"""Ids that every one of the tiny tokenizers has."""


@dataclass
class Subject:
    """What a test needs of one language model."""

    folder: Path
    kind: str
    model: LanguageModel
    shards: ShardSet
    transcoder: Transcoder
    run: Path
    special_ids: tuple[int, ...]
    """With a pad in the middle of some contexts; of GPT-2 the one special token there is."""
    _plain: list[Any] = field(default_factory=list)

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return self.model.d_model

    def config(self, tmp: Path | None = None, **settings: Any) -> EvaluateConfig:
        """Settings on this shard set; results in `tmp`."""
        return EvaluateConfig.model_validate({"shards": self.shards.path, "device": "cpu", "out": tmp, **settings})

    def plain(self) -> Any:
        """The Hugging Face model, loaded for itself."""
        if not self._plain:
            from transformers import AutoModelForCausalLM

            self._plain.append(AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval())
        return self._plain[0]

    def modules(self) -> tuple[Any, Any]:
        """(the norm before the MLP of LAYER, the module whose output is mlp_out), from transformers' own files."""
        plain = self.plain()
        if self.kind == "gpt2":
            block = plain.transformer.h[LAYER]
            return block.ln_2, block.mlp
        block = plain.model.layers[LAYER]
        if self.kind == "gemma2":
            return block.pre_feedforward_layernorm, block.post_feedforward_layernorm
        return block.post_attention_layernorm, block.mlp

    @torch.no_grad()
    def logits(self, tokens: list[int], edit: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Logits [T, n_tokens] of one context, mlp_out [T, d] becoming edit(u [T, d], mlp_out): plain torch hooks.

        u is what the MLP reads, which the transcoder reads too (`mlp_in`).
        """
        norm, out = self.modules()
        seen: list[Tensor] = []
        handles = [norm.register_forward_hook(lambda _m, _a, given: seen.append(given[0].clone()))]
        if edit is not None:
            handles.append(out.register_forward_hook(lambda _m, _a, given: edit(seen[-1], given[0])[None]))
        try:
            return self.plain()(torch.tensor([tokens])).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def contexts(self, split: str = "val") -> list[tuple[list[int], list[int]]]:
        """(tokens, document of each) of every context."""
        part = self.shards.split(split)
        return [
            (tokens, docs)
            for shard in range(part.n_shards)
            for tokens, docs in zip(part.tokens(shard).tolist(), part.doc_ids(shard).tolist(), strict=True)
        ]

    def is_scored(self, tokens: list[int], docs: list[int], p: int) -> bool:
        """Whether position p counts, in words: an ordinary token, followed by one of the same document."""
        if p + 1 == len(tokens) or docs[p] != docs[p + 1]:
            return False
        return tokens[p] not in self.special_ids and tokens[p + 1] not in self.special_ids


def _shards(path: Path, folder: Path, model: LanguageModel) -> ShardSet:
    generator = torch.Generator().manual_seed(3)
    names = [f"blocks.{LAYER}.hook_resid_mid", f"blocks.{LAYER}.hook_mlp_out"]
    norm = model.norm_before("resid_mid", LAYER)
    assert norm is not None
    manifest = Manifest(
        model={**model.describe(), "model": str(folder)},
        dataset={"name": "random"},
        source=SiteFacts(site="resid_mid", layer=LAYER, hook_point=names[0], width=model.d_model),
        target=SiteFacts(site="mlp_out", layer=LAYER, hook_point=names[1], width=model.d_model),
        ctx_len=CTX_LEN,
        bos_id=model.bos_id,
        special_ids=model.special_ids,
        norm=NormFacts(kind=norm.kind, eps=norm.eps, has_bias=norm.bias is not None),
        codec="raw",
        splits={
            name: SplitPlan(contexts=max(sizes), chunk_positions=CTX_LEN, shard_contexts=sizes)
            for name, sizes in SHARD_CONTEXTS.items()
        },
        settings={},
        versions={},
    )
    writer = ShardSetWriter.open(path, manifest, norm)
    document = 0
    for split, sizes in SHARD_CONTEXTS.items():
        for shard, n in enumerate(sizes):
            tokens = torch.randint(4, N_TOKENS, (n, CTX_LEN), generator=generator)
            tokens[:, 0] = model.bos_id if model.bos_id is not None else 0
            tokens[0, 6] = model.special_ids[0]
            doc_ids = torch.arange(n * CTX_LEN, dtype=torch.int32).view(n, CTX_LEN) // (CTX_LEN - 4) + document
            document = int(doc_ids.max()) + 1
            found = model.capture(tokens, names)
            source, target = (found[name].transpose(0, 1).bfloat16() for name in names)
            writer.write_shard(split, shard, tokens.int(), doc_ids, source, target)
    writer.finish()
    return ShardSet.open(path)


def _transcoder(model: LanguageModel, folder: Path, shards: ShardSet) -> Transcoder:
    from matryoshka.transcoder import TranscoderConfig

    d = model.d_model
    config = TranscoderConfig(
        d_in=d,
        d_out=d,
        group_sizes=GROUP_SIZES,
        k=6,
        input="mlp_in",
        source_hook=f"blocks.{LAYER}.hook_resid_mid",
        target_hook=f"blocks.{LAYER}.hook_mlp_out",
        model=str(folder),
    )
    generator = torch.Generator().manual_seed(11)
    reads = float(shards.stats("with_gain").variance.mean().sqrt())
    spread = float(shards.stats("target").variance.mean().sqrt())
    transcoder = Transcoder(config)
    d_sae = config.d_sae
    transcoder.set_weights(
        {
            "W_enc": torch.randn(d, d_sae, generator=generator) / d**0.5 / reads,
            "b_enc": torch.randn(d_sae, generator=generator) * 0.1,
            "W_dec": torch.nn.functional.normalize(torch.randn(d_sae, d, generator=generator), dim=1) * spread,
            "b_dec": shards.stats("target").mean.float(),
            # The last latent never fires.
            "threshold": torch.cat([torch.rand(d_sae - 1, generator=generator), torch.tensor([1e9])]),
        }
    )
    return transcoder


@pytest.fixture(scope="session")
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, made: Any
) -> Callable[[str], Subject]:
    """A function "gemma2" | "llama" | "gpt2" -> its subject, made once."""
    found: dict[str, Subject] = {}

    def get(kind: str) -> Subject:
        if kind not in found:
            folder = request.getfixturevalue(f"tiny_{kind}")
            model = LanguageModel.load(str(folder), dtype="float32", device="cpu")
            place = tmp_path_factory.mktemp(kind)
            shards = _shards(place / f"l{LAYER}", folder, model)
            transcoder = _transcoder(model, folder, shards)
            run = made.run(place / f"l{LAYER}-k6", transcoder)
            found[kind] = Subject(folder, kind, model, shards, transcoder, run, model.special_ids)
        return found[kind]

    return get
