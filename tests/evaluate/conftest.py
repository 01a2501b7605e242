"""Small shard sets and transcoders made by hand, and tiny language models with sets of their own activations.

All sizes differ from one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluate.analyses.ablate.result import Ablation
from evaluate.analyses.faithfulness.result import Faithfulness
from evaluate.analyses.hierarchy.result import Hierarchy
from evaluate.analyses.logits.logits import Logits
from evaluate.config import EvaluateConfig
from evaluate.result import Result
from evaluate.rows.words import is_test_word
from matryoshka.lm import LanguageModel
from matryoshka.norms import Norm
from matryoshka.runs import publish_json
from matryoshka.shards import Manifest, ShardSet, ShardSetWriter, SiteFacts, SplitPlan
from matryoshka.shards.manifest import NormFacts
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
    doc_len: int | None = None,
    architecture: str | None = None,
) -> ShardSet:
    """A finished set: BOS at position 0 and one more special token (id 0) here and there.

    Documents end with a shard; with `doc_len` they are of that length and go on in the next shard of their split.

    `source` maps random [..., d_in] to the source, `target` maps the source to the target; both are rounded to bf16.
    """
    generator = torch.Generator().manual_seed(seed)
    norm = random_norm(d_in)
    plans = {
        "train": SplitPlan(contexts=4, chunk_positions=4, shard_contexts=(4, 2)),
        "val": SplitPlan(contexts=max(val_contexts), chunk_positions=2, shard_contexts=val_contexts),
    }
    manifest = Manifest(
        model={"model": MODEL, "revision": "abc", **({} if architecture is None else {"architecture": architecture})},
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
        n_before, first_document = 0, document
        for shard, n in enumerate(plan.shard_contexts):
            tokens = torch.randint(3, 40, (n, ctx_len), generator=generator, dtype=torch.int32)
            tokens[:, 0] = BOS
            tokens[0, ctx_len // 2] = 0
            doc_ids = torch.arange(n * ctx_len, dtype=torch.int32).view(n, ctx_len) // (ctx_len + 3) + document
            if doc_len is not None:
                doc_ids = (torch.arange(n * ctx_len, dtype=torch.int32) + n_before).view(n, ctx_len) // doc_len
                doc_ids += first_document
            n_before += n * ctx_len
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


def save_run(
    path: Path,
    transcoder: Transcoder,
    *,
    steps: tuple[int, ...] = (100, 400),
    finished: bool = True,
    shards: ShardSet | None = None,
    batch_tokens: int = 11,
) -> Path:
    """A run directory whose newest checkpoint holds `transcoder`; older ones hold other weights.

    run.json says that it was trained on `shards`, in batches of `batch_tokens`.
    """
    for step in steps:
        newest = step == max(steps)
        other = transcoder if newest else random_transcoder(seed=step, **transcoder.config.model_dump())
        folder = path / "checkpoints" / f"step-{step:06d}"
        other.save(folder)
        publish_json(folder / "state.json", {"format_version": 1, "step": step, "finished": newest and finished})
    config: dict[str, Any] = {"batch_tokens": batch_tokens}
    record: dict[str, Any] = {"format_version": 1, "config": config}
    if shards is not None:
        config["shards"] = str(shards.path)
        record["identity"] = {"shard_set": {"name": shards.name, "digest": shards.digest}}
    publish_json(path / "run.json", record)
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


def small_results(facts: dict[str, Any]) -> dict[str, Result]:
    """A small result of each analysis that needs a language model, clusters or words; `facts` are those of `Result`.

    Whoever needs other numbers changes them with `model_copy`. Their tables are not made.
    """
    spliced = {"l0": 4.0, "ce_loss_spliced": 3.2, "ce_increase": 0.2, "kl": 0.2, "top1_agreement": 0.8}
    intervals = dict.fromkeys(("ce_increase_interval", "ce_recovered_zero_interval", "ce_recovered_mean_interval"))
    prefixes = [
        {
            **{**spliced, **intervals, "kl_interval": None, "prefix": i + 1, "prefix_end": end},
            **{"ce_recovered_zero": 0.9, "ce_recovered_mean": 0.5 + i / 8},
        }
        for i, end in enumerate((6, 17, 48))
    ]
    losses = {"ce_loss_clean": 3.0, "ce_loss_ablated_zero": 5.0, "ce_loss_ablated_mean": 4.0}
    divergences = {"kl_ablated_zero": 2.0, "kl_ablated_mean": 1.0, "n_contexts": 9, "n_tokens": 1234}
    changes = {"mean_act": 2.0, "loss_change": 0.15, "kl": 0.0123456, "top1_changed": 0.25, "loss_change_later": None}
    counts = {"n_contexts_firing": 5, "n_contexts": 5, "n_positions": 7, "n_later": 0, "kl_later": None}
    ablation = {"latent": 20, "scale": 0.0, **changes, **counts, "loss_change_interval": [0.1, 0.2], "lowered": []}
    relations = {"n_rows": 9, "fvu_without_latents": None, "groups": [], "pairs": [], "n_edges": 0, "clusters": None}
    return {
        "logits": Logits.model_validate({**facts, "norm": "rms", "n_tokens": 40}),
        "hierarchy": Hierarchy.model_validate({**facts, **relations}),
        "faithfulness": Faithfulness.model_validate({**facts, **losses, **divergences, "prefixes": prefixes}),
        "ablate": Ablation.model_validate(
            {**facts, **ablation, "raised": [{"token": 36, "text": "ignored", "effect": 0.25}]}
        ),
    }


class Made:
    """The makers above, for tests (which cannot import a conftest)."""

    shards = staticmethod(build_shards)
    transcoder = staticmethod(random_transcoder)
    run = staticmethod(save_run)
    kept_rows = staticmethod(kept_rows)
    norm = staticmethod(random_norm)
    results = staticmethod(small_results)
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


# --- tiny language models, a shard set of their own activations, and a random transcoder of one of their layers -------

LAYER, LM_CTX_LEN = 1, 13
LM_GROUP_SIZES = (5, 9, 17)
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


def _lm_shards(path: Path, folder: Path, model: LanguageModel) -> ShardSet:
    generator = torch.Generator().manual_seed(3)
    names = [f"blocks.{LAYER}.hook_resid_mid", f"blocks.{LAYER}.hook_mlp_out"]
    norm = model.norm_before("resid_mid", LAYER)
    assert norm is not None
    manifest = Manifest(
        model={**model.describe(), "model": str(folder)},
        dataset={"name": "random"},
        source=SiteFacts(site="resid_mid", layer=LAYER, hook_point=names[0], width=model.d_model),
        target=SiteFacts(site="mlp_out", layer=LAYER, hook_point=names[1], width=model.d_model),
        ctx_len=LM_CTX_LEN,
        bos_id=model.bos_id,
        special_ids=model.special_ids,
        norm=NormFacts(kind=norm.kind, eps=norm.eps, has_bias=norm.bias is not None),
        codec="raw",
        splits={
            name: SplitPlan(contexts=max(sizes), chunk_positions=LM_CTX_LEN, shard_contexts=sizes)
            for name, sizes in SHARD_CONTEXTS.items()
        },
        settings={},
        versions={},
    )
    writer = ShardSetWriter.open(path, manifest, norm)
    document = 0
    for split, sizes in SHARD_CONTEXTS.items():
        for shard, n in enumerate(sizes):
            tokens = torch.randint(4, N_TOKENS, (n, LM_CTX_LEN), generator=generator)
            tokens[:, 0] = model.bos_id if model.bos_id is not None else 0
            tokens[0, 6] = model.special_ids[0]
            doc_ids = torch.arange(n * LM_CTX_LEN, dtype=torch.int32).view(n, LM_CTX_LEN) // (LM_CTX_LEN - 4) + document
            document = int(doc_ids.max()) + 1
            found = model.capture(tokens, names)
            source, target = (found[name].transpose(0, 1).bfloat16() for name in names)
            writer.write_shard(split, shard, tokens.int(), doc_ids, source, target)
    writer.finish()
    return ShardSet.open(path)


def _lm_transcoder(model: LanguageModel, folder: Path, shards: ShardSet) -> Transcoder:
    d = model.d_model
    config = TranscoderConfig(
        d_in=d,
        d_out=d,
        group_sizes=LM_GROUP_SIZES,
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
            shards = _lm_shards(place / f"l{LAYER}", folder, model)
            transcoder = _lm_transcoder(model, folder, shards)
            run = made.run(place / f"l{LAYER}-k6", transcoder)
            found[kind] = Subject(folder, kind, model, shards, transcoder, run, model.special_ids)
        return found[kind]

    return get


# --- words whose first letter is planted in the source, and a transcoder that absorbs some of them --------------------

LETTERS = "abcdefgh"
N_WORDS = 30
WORDS_D_IN, WORDS_CTX_LEN = 40, 33
WORDS_FACTS = {
    "source_hook": "blocks.1.hook_resid_mid",
    "target_hook": "blocks.1.hook_mlp_out",
    "model": "planted",
    "model_revision": None,
}
WORDS = [letter + "xyz"[i % 3] * (i // 3 + 1) for letter in LETTERS for i in range(N_WORDS)]
PIECES = ["<s>", *(f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in WORDS), *".,!?;:()[]{}-+=*", "ing", *"0123456789"]
TEST_WORDS = [word for word in WORDS if is_test_word(word, 0.3, 0)]
ABSORBED = [word for word in TEST_WORDS if word[0] == "a"][:2] + [word for word in TEST_WORDS if word[0] == "c"][:1]


def word_source(word: str) -> Tensor:
    """3 along the letter's own dimension, 1.5 along a direction of the word's own in the others but the last."""
    own = torch.randn(WORDS_D_IN - len(LETTERS) - 1, generator=torch.Generator().manual_seed(WORDS.index(word)))
    letter = torch.zeros(len(LETTERS))
    letter[LETTERS.index(word[0])] = 3.0
    return torch.cat([letter, 1.5 * torch.nn.functional.normalize(own, dim=0), torch.zeros(1)])


def _letters(folder: Path) -> ShardSet:
    """A set of random words and punctuation, and its tokenizer in a folder beside it."""
    from tokenizers import Tokenizer, models

    (folder / "tokenizer").mkdir()
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<s>")).save(str(folder / "tokenizer" / "tokenizer.json"))
    plans = {
        "train": SplitPlan(contexts=40, chunk_positions=11, shard_contexts=(40, 30)),
        "val": SplitPlan(contexts=40, chunk_positions=3, shard_contexts=(40,)),
    }
    manifest = Manifest(
        model={"model": "planted", "tokenizer": {"name": str(folder / "tokenizer")}},
        dataset={"name": "random words"},
        source=SiteFacts(site="resid_mid", layer=1, hook_point=WORDS_FACTS["source_hook"] or "", width=WORDS_D_IN),
        target=SiteFacts(site="mlp_out", layer=1, hook_point=WORDS_FACTS["target_hook"] or "", width=D_OUT),
        ctx_len=WORDS_CTX_LEN,
        bos_id=0,
        special_ids=(0,),
        norm=None,
        codec="raw",
        splits=plans,
        settings={},
        versions={},
    )
    table = torch.zeros(len(PIECES), WORDS_D_IN)
    for number, word in enumerate(WORDS, start=1):
        table[number] = word_source(word)
    writer, generator, document = ShardSetWriter.open(folder / "l1", manifest, None), torch.Generator(), 0
    generator.manual_seed(0)
    for split, plan in plans.items():
        for shard, n in enumerate(plan.shard_contexts):
            tokens = torch.randint(1, len(PIECES), (n, WORDS_CTX_LEN), generator=generator, dtype=torch.int32)
            tokens[:, 0] = 0
            x = table[tokens.long()] + 0.05 * torch.randn(n, WORDS_CTX_LEN, WORDS_D_IN, generator=generator)
            # Each context is a document; those with an even number have more along the last dimension.
            docs = torch.arange(document, document + n, dtype=torch.int32)[:, None].repeat(1, WORDS_CTX_LEN)
            x[..., -1] += 2.0 * (docs % 2 == 0)
            document += n
            y = torch.randn(WORDS_CTX_LEN, n, D_OUT, generator=generator)
            source = x.transpose(0, 1).contiguous().bfloat16()
            writer.write_shard(split, shard, tokens, docs.contiguous(), source, y.bfloat16())
    writer.finish()
    return ShardSet.open(folder / "l1")


def _letter_transcoder() -> Transcoder:
    """Weights whose first group has a latent a letter; the second has one for each of ABSORBED, whose words the
    letter's latent of the full transcoder does not fire on."""
    assert len(ABSORBED) == 3
    n = len(LETTERS)
    sizes = (n, len(ABSORBED) + 2)
    transcoder = random_transcoder(d_in=WORDS_D_IN, d_out=D_OUT, group_sizes=sizes, k=3, **WORDS_FACTS)
    W_enc = torch.zeros(WORDS_D_IN, sum(sizes))
    W_enc[:n, :n] = torch.eye(n)
    for number, word in enumerate(ABSORBED):
        direction = word_source(word)
        direction[:n] = 0
        direction = torch.nn.functional.normalize(direction, dim=0)
        W_enc[:, n + number] = direction
        W_enc[:, LETTERS.index(word[0])] -= 2 * direction
    weights = dict(transcoder.named_parameters())
    threshold = torch.cat([torch.full((n,), 1.0), torch.full((len(ABSORBED) + 2,), 1.3)])
    made_up = {"W_enc": W_enc, "b_enc": torch.zeros(sum(sizes)), "threshold": threshold}
    transcoder.set_weights({**{name: weight.detach() for name, weight in weights.items()}, **made_up})
    return transcoder


@dataclass(frozen=True)
class Planted:
    """A shard set of random words and a transcoder of it."""

    shards: ShardSet
    transcoder: Transcoder
    letters: str = LETTERS
    absorbed: tuple[str, ...] = tuple(ABSORBED)
    ctx_len: int = WORDS_CTX_LEN


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Made once."""
    return Planted(_letters(tmp_path_factory.mktemp("letters")), _letter_transcoder())
