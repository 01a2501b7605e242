"""`evaluate ablate`: take single latents out of the model, or scale them, in contexts where they fire."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm.splice import edited
from matryoshka.runs import make_directory, publish_json
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from ..analysis import Progress, Silent, load_transcoder
from ..bootstrap import DOCUMENTS
from ..checkpoint import find_checkpoint
from ..config import EvaluateConfig
from ..result import ShardSetFacts, TranscoderFacts, already_answered, identity_of, result_folder
from ..sampling import count_contexts
from .ablation_file import ABLATIONS_FOLDER, Ablation, TokenChange, read_ablation
from .contexts import Contexts, context_batches
from .firing import find_firing
from .model import load_model, text_of_tokens, weight_dtype
from .recovered import DocumentSums, Estimates, increase, mean_of
from .scores import score

_COLUMNS = ("n", "clean.ce", "changed.ce", "changed.kl", "changed.top1", "act", "later.n", "later.ce", "later.kl")
"""What is summed of each document, at positions where the latent fires and at later ones."""


@dataclass(frozen=True, slots=True)
class Ablated:
    """One ablations/<latent>.json and how it came about."""

    path: Path
    ablation: Ablation
    is_new: bool
    replaced: tuple[str, ...] = ()


def ablate(
    run: Path, latents: list[int], config: EvaluateConfig, progress: Progress | None = None, *, scale: float = 0.0
) -> list[Ablated]:
    """Multiply the activation of each of `latents`, one at a time, with `scale`, and publish what that changes.

    The contexts are drawn (seeded) among those of the first `config.tokens` rows where the latent fires. Records that
    already answer are only read. Raises UserError for what the user can mend.
    """
    if config.shards is None:
        raise UserError("no shard set was named; pass --shards, for example --shards data/l17")
    shards, checkpoint = ShardSet.open(config.shards), find_checkpoint(run)
    # A latent is the same in every prefix that holds it.
    config = config.model_copy(update={"prefix": None})
    transcoder = load_transcoder(checkpoint, shards, config)
    latents = list(dict.fromkeys(latents))
    check_latents(transcoder, latents, run)
    folder = result_folder(checkpoint, shards, config) / ABLATIONS_FOLDER
    facts = {
        "transcoder": TranscoderFacts.of(checkpoint, transcoder),
        "shard_set": ShardSetFacts.of(shards, config.split),
        "settings": _settings(shards, config, scale),
    }
    done: dict[int, Ablated] = {}
    changed: dict[int, tuple[str, ...]] = {}
    for latent in latents:
        path = folder / f"{latent}.json"
        existing, changes = already_answered(read_ablation(path), identity_of(**facts))
        if existing is not None:
            done[latent] = Ablated(path, existing, is_new=False)
        else:
            changed[latent] = changes
    if changed:
        make_directory(folder)
        ablating = _Ablating(transcoder, shards, config, scale, facts, progress or Silent())
        for latent, firing in ablating.firing(list(changed), checkpoint.name).items():
            ablation = ablating.of(latent, firing)
            path = folder / f"{latent}.json"
            publish_json(path, ablation.model_dump(mode="json"))
            done[latent] = Ablated(path, ablation, is_new=True, replaced=changed[latent])
    return [done[latent] for latent in latents]


def check_latents(transcoder: Transcoder, latents: list[int], run: Path) -> None:
    """Raise UserError unless there is one and the transcoder has them all."""
    d_sae = transcoder.config.d_sae
    if not latents:
        raise UserError("no latent was named; give one or more numbers, for example 17")
    if wrong := [latent for latent in latents if not 0 <= latent < d_sae]:
        raise UserError(f"{run} has the latents 0 to {d_sae - 1}, and no latent {wrong[0]}")


class _Ablating:
    """Runs contexts through the model with a latent scaled."""

    def __init__(
        self,
        transcoder: Transcoder,
        shards: ShardSet,
        config: EvaluateConfig,
        scale: float,
        facts: dict[str, Any],
        progress: Progress,
    ) -> None:
        self._model = load_model(shards, config)
        self._text_of = text_of_tokens(self._model)
        self._transcoder = transcoder.to(self._model.device)
        self._shards, self._config, self._scale, self._facts = shards, config, scale, facts
        self._progress = progress

    def firing(self, latents: list[int], name: str) -> dict[int, Tensor]:
        """Latent -> numbers of the contexts in which it fires."""
        split = self._shards.split(self._config.split)
        n_contexts, n_rows = count_contexts(split, self._config.tokens)
        self._progress.started(f"{name}: where they fire", n_rows)
        found = find_firing(self._transcoder, self._shards, split, latents, n_contexts, self._progress)
        return {latent: counts.nonzero()[:, 0] for latent, counts in zip(latents, found.counts, strict=True)}

    def of(self, latent: int, firing: Tensor) -> Ablation:
        """Ablate one latent in contexts drawn from `firing`."""
        config = self._config
        drawn = torch.randperm(len(firing), generator=torch.Generator().manual_seed(config.seed))
        numbers = firing[drawn[: config.ablate.contexts]].sort().values.tolist()
        self._progress.started(f"latent {latent}", len(numbers) * self._shards.ctx_len)
        sums = DocumentSums.empty(len(_COLUMNS))
        log_ratio = torch.zeros(0, dtype=torch.float64)
        split = self._shards.split(config.split)
        for contexts in context_batches(self._shards, split, numbers, config.lm.batch_tokens):
            part, ratio = self._sums(latent, contexts)
            sums.add(contexts.documents(), part)
            log_ratio = log_ratio + ratio if len(log_ratio) else ratio
            self._progress.advanced(contexts.tokens.numel())
        columns = dict(zip(_COLUMNS, sums.rows.T, strict=True))
        return self._ablation(latent, len(firing), len(numbers), columns, log_ratio)

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
        here = (act > 0) & contexts.scored
        later = contexts.scored & (act == 0) & ((act > 0).cumsum(1) > 0)
        on = score(clean, changed, here, contexts.next_tokens(here), ratios=True)
        after = score(clean, changed, later, contexts.next_tokens(later))
        assert on.log_ratio is not None
        of_firing = {
            "n": torch.ones_like(on.kl),
            "clean.ce": on.ce_clean,
            "changed.ce": on.ce,
            "changed.kl": on.kl,
            "changed.top1": on.same_top,
            "act": act[here],
        }
        of_later = {"later.n": torch.ones_like(after.kl), "later.ce": after.ce - after.ce_clean, "later.kl": after.kl}
        sums = {name: contexts.per_document(values, here) for name, values in of_firing.items()}
        sums |= {name: contexts.per_document(values, later) for name, values in of_later.items()}
        return torch.stack([sums[name] for name in _COLUMNS], 1), on.log_ratio

    def _ablation(
        self, latent: int, n_firing: int, n_contexts: int, sums: dict[str, Tensor], log_ratio: Tensor
    ) -> Ablation:
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
            effect = log_ratio[: len(self._model.tokenizer)] / n_positions
            sides = [self._strongest(effect, sign) for sign in (1, -1)]
        return Ablation(
            **self._facts,
            **numbers,
            latent=latent,
            scale=self._scale,
            n_contexts_firing=n_firing,
            n_contexts=n_contexts,
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


def latent_acts(transcoder: Transcoder, latent: int, x: Tensor) -> Tensor:
    """Activations [...] of one latent for inputs x [..., d_in] in the transcoder's convention; float32."""
    pre_acts = x @ transcoder.W_enc[:, latent] + transcoder.b_enc[latent]
    return torch.where(pre_acts > transcoder.threshold[latent].clamp_min(0), pre_acts, 0.0)


def _settings(shards: ShardSet, config: EvaluateConfig, scale: float) -> dict[str, Any]:
    return {
        **config.ablate.model_dump(mode="json"),
        "scale": scale,
        "tokens": config.tokens,
        "split": config.split,
        "bootstrap": config.bootstrap,
        **DOCUMENTS,
        "seed": config.seed,
        "dtype": weight_dtype(shards, config),
    }
