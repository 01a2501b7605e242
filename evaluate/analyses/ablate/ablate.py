"""`evaluate ablate`: take single latents out of the model, or scale them, in contexts where they fire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka.lm.splice import edited
from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable
from matryoshka.transcoder import Transcoder

from ...analysis import Analysis, Job
from ...config import EvaluateConfig
from ...language_model.load import load_model, text_of_tokens, weight_dtype
from ...language_model.scores import score
from ...measures.bootstrap import DOCUMENTS
from ...measures.firing import Firing, add_firing, latent_acts
from ...measures.recovered import DocumentSums, Estimates, increase, mean_of
from ...rows.batches import check_rows
from ...rows.context_blocks import count_contexts
from ...rows.contexts import Contexts, context_batches
from ...subject.latents import check_latents
from ...tables import FEW_DOCUMENTS
from .result import ABLATIONS_FOLDER, Ablation, TokenChange
from .table import ablation_table

_COLUMNS: tuple[str, ...] = (
    "n",
    "clean.ce",
    "changed.ce",
    "changed.kl",
    "changed.top1",
    "act",
    "later.n",
    "later.ce",
    "later.kl",
)
"""What is summed of each document, at positions where the latent fires and at later ones."""


class AblateAnalysis(Analysis[Ablation]):
    """What changes when the activation of each of `latents`, one at a time, is multiplied with `scale`.

    The contexts are drawn (seeded) among those of the first `config.tokens` rows where the latent fires. Each latent
    has a file of its own.
    """

    name = "ablate"
    result = Ablation
    shared = ("tokens", "split", "bootstrap", "seed")
    # A latent is the same in every prefix that holds it.
    apart = ("split",)
    unit = "contexts"

    def __init__(self, latents: Sequence[int], scale: float = 0.0) -> None:
        self.latents, self.scale = tuple(dict.fromkeys(latents)), scale
        self._ablating: _Ablating | None = None

    def parts(self) -> list[Analysis[Ablation]]:
        """One a latent."""
        return [_OfLatent(self, latent) for latent in self.latents]

    def check(self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig) -> None:
        """The latents must be there, and rows."""
        check_latents(transcoder.config.d_sae, self.latents)
        check_rows(shards, config.split)

    def tables(self, results: Sequence[Ablation]) -> list[ResultTable]:
        """One of each run."""
        runs = dict.fromkeys(one.transcoder.sha256 for one in results)
        return [ablation_table([one for one in results if one.transcoder.sha256 == run]) for run in runs]

    def notes(self, result: Ablation) -> list[str]:
        """Where there was nothing to take out, or little."""
        n_documents = result.n_documents
        if result.n_contexts_firing == 0:
            return [f"latent {result.latent} fires in none of the contexts"]
        if n_documents is not None and n_documents < FEW_DOCUMENTS:
            return [f"latent {result.latent}: few documents ({n_documents}), so its interval is only a hint"]
        return []

    def ablating(self, job: Job) -> _Ablating:
        """The model, and where the latents of one run fire; made once for all of them."""
        if self._ablating is None or not self._ablating.is_of(job):
            self._ablating = _Ablating(job, self.latents, self.scale)
        return self._ablating


class _OfLatent(AblateAnalysis):
    """One latent of those that are asked for together."""

    def __init__(self, together: AblateAnalysis, latent: int) -> None:
        super().__init__((latent,), together.scale)
        self._together, self._latent = together, latent

    @property
    def file(self) -> str:
        """ablations/<latent>.json"""
        return f"{ABLATIONS_FOLDER}/{self._latent}.json"

    def asked(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:
        """The factor, and how the model's weights are rounded."""
        return {"scale": self.scale, "dtype": weight_dtype(shards, config), **DOCUMENTS}

    def make(self, job: Job) -> Ablation:
        """Run the drawn contexts through the model."""
        return self._together.ablating(job).of(self._latent, job)


@dataclass
class _Drawn:
    """Where all latents fire; the contexts of one of them, and the sums over those that are done."""

    latents: Tensor
    """int64 [latents]: those that were asked for together."""
    firing: Firing
    n_firing: int | None = None
    """Contexts in which it fires; None before that is known."""
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64 [contexts]: those that were drawn."""
    n_done: int = 0
    """The first so many of them are in the sums."""
    sums: DocumentSums = field(default_factory=lambda: DocumentSums.empty(len(_COLUMNS)))
    log_ratio: Float[Tensor, " tokens"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """log q - log p of every token, summed over the firing positions; empty before the first context."""


class _Ablating:
    """Runs contexts through the model with a latent scaled."""

    def __init__(self, job: Job, latents: Sequence[int], scale: float) -> None:
        self._model = load_model(job.shards, job.config)
        self._text_of = text_of_tokens(self._model)
        self._transcoder = job.transcoder.to(self._model.device)
        self._shards, self._config, self._sha256 = job.shards, job.config, job.checkpoint.sha256
        self._latents, self._scale = list(latents), scale
        self._n_contexts, self._n_rows = count_contexts(job.shards.split(job.config.split), job.config.tokens)
        self._firing = Firing.empty(len(self._latents), self._n_contexts)

    def is_of(self, job: Job) -> bool:
        """Whether it was made for this run and shard set."""
        return self._shards is job.shards and self._sha256 == job.checkpoint.sha256

    def of(self, latent: int, job: Job) -> Ablation:
        """Ablate one latent in contexts drawn from those where it fires."""
        config, done = self._config, self._begun(job)
        if done.n_firing is None:
            firing = done.firing.counts[self._latents.index(latent)].nonzero()[:, 0]
            order = torch.randperm(len(firing), generator=torch.Generator().manual_seed(config.seed))
            done.n_firing, done.numbers = len(firing), firing[order[: config.ablate.contexts]].sort().values
        numbers = done.numbers.tolist()
        job.progress.started(f"latent {latent}", len(numbers) * self._shards.ctx_len)
        job.progress.advanced(done.n_done * self._shards.ctx_len)
        split = self._shards.split(config.split)
        for contexts in context_batches(self._shards, split, numbers[done.n_done :], config.lm.batch_tokens):
            part, ratio = self._sums(latent, contexts)
            done.sums.add(contexts.documents(), part)
            done.log_ratio = done.log_ratio + ratio if len(done.log_ratio) else ratio
            done.n_done += len(contexts.numbers)
            job.saved.save_when_due(done, done.n_done)
            job.progress.advanced(contexts.tokens.numel())
        return self._ablation(latent, done, job.facts)

    def _begun(self, job: Job) -> _Drawn:
        """What was saved of this latent, with where all of them fire: that is found out once, and saved with each."""
        done = _Drawn(torch.tensor(self._latents), Firing.empty(len(self._latents), self._n_contexts))
        job.saved.load(done)
        if self._firing.n_rows < self._n_rows and done.latents.tolist() == self._latents:
            self._firing = done.firing
        # What was saved may be of latents that were asked for beside this one then.
        done.latents, done.firing = torch.tensor(self._latents), self._firing
        if done.n_firing is None and self._firing.n_rows < self._n_rows:
            job.progress.started(f"{job.name}: where they fire", self._n_rows)
            job.progress.advanced(self._firing.n_rows)
            split = self._shards.split(self._config.split)
            for n_rows in add_firing(self._firing, self._transcoder, self._shards, split, self._latents):
                job.saved.save_when_due(done, 0)
                job.progress.advanced(n_rows)
        job.saved.save(done, done.n_done)
        return done

    def _sums(self, latent: int, contexts: Contexts) -> tuple[Tensor, Tensor]:
        """_COLUMNS of each of `contexts.documents()`, float64 [documents, columns], and log q - log p of every token
        summed over the firing positions."""
        transcoder, passed = self._transcoder, []
        replaced = contexts.replaced.to(self._model.device)

        def scaled(x: Tensor, target: Tensor) -> Tensor:
            act = latent_acts(transcoder, latent, x.to(transcoder.device)) * replaced
            passed.append(act)
            return target + (self._scale - 1) * act[..., None] * transcoder.W_dec[latent]

        clean = self._model.logits(contexts.tokens)
        with edited(transcoder, self._model, scaled):
            changed = self._model.logits(contexts.tokens)
        act = passed[0].cpu()
        firing = (act > 0) & contexts.scored
        later = contexts.scored & (act == 0) & ((act > 0).cumsum(1) > 0)
        on = score(clean, changed, firing, contexts.next_tokens(firing), ratios=True)
        after = score(clean, changed, later, contexts.next_tokens(later))
        assert on.log_ratio is not None
        of_firing = {
            "n": torch.ones_like(on.kl),
            "clean.ce": on.ce_clean,
            "changed.ce": on.ce,
            "changed.kl": on.kl,
            "changed.top1": on.same_top,
            "act": act[firing],
        }
        of_later = {"later.n": torch.ones_like(after.kl), "later.ce": after.ce - after.ce_clean, "later.kl": after.kl}
        sums = {name: contexts.per_document(values, firing) for name, values in of_firing.items()}
        sums |= {name: contexts.per_document(values, later) for name, values in of_later.items()}
        return torch.stack([sums[name] for name in _COLUMNS], 1), on.log_ratio

    def _ablation(self, latent: int, done: _Drawn, facts: Mapping[str, Any]) -> Ablation:
        sums = dict(zip(_COLUMNS, done.sums.rows.T, strict=True))
        n_positions = int(sums["n"].sum())
        numbers: dict[str, Any] = dict.fromkeys(
            ("mean_act", "loss_change", "kl", "top1_changed", "loss_change_later", "kl_later", "loss_change_interval")
        )
        n_later = 0
        sides: list[tuple[TokenChange, ...]] = [(), ()]
        if n_positions:
            estimates = Estimates.of(sums, self._config.bootstrap, self._config.seed)
            n_later = int(estimates.totals["later.n"])
            numbers |= {
                "mean_act": estimates.value(mean_of("act")),
                "loss_change": estimates.value(increase("changed")),
                "kl": estimates.value(mean_of("changed.kl")),
                "top1_changed": 1 - estimates.value(mean_of("changed.top1")),
                "loss_change_interval": estimates.interval(increase("changed")),
            }
            if n_later:
                numbers["loss_change_later"] = float(estimates.totals["later.ce"]) / n_later
                numbers["kl_later"] = float(estimates.totals["later.kl"]) / n_later
            effect = done.log_ratio[: len(self._model.tokenizer)] / n_positions
            sides = [self._strongest(effect, sign) for sign in (1, -1)]
        return Ablation(
            **facts,
            **numbers,
            latent=latent,
            scale=self._scale,
            n_contexts_firing=done.n_firing or 0,
            n_contexts=done.n_done,
            n_documents=int((sums["n"] > 0).sum()),
            n_positions=n_positions,
            n_later=n_later,
            raised=sides[0],
            lowered=sides[1],
        )

    def _strongest(self, effect: Tensor, sign: int) -> tuple[TokenChange, ...]:
        found = (sign * effect).topk(min(self._config.ablate.top, len(effect)))
        pairs = zip(found.indices.tolist(), (sign * found.values).tolist(), strict=True)
        return tuple(TokenChange(token=token, text=self._text_of(token), effect=value) for token, value in pairs)
