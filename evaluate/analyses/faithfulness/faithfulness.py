"""`evaluate faithfulness`: the language model's loss with y_hat in place of the target.

One context goes through the model 3 + G times: as it is, with the target set to zero, to its mean, and to each of the
G nested reconstructions. Only the target site changes, so all before it is the same in all of them, and the
transcoder is run once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.splice import edited
from matryoshka.progress import duration
from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable
from matryoshka.transcoder import Transcoder

from ...analysis import Analysis, Job
from ...config import EvaluateConfig
from ...language_model.load import load_model, weight_dtype
from ...language_model.scores import score
from ...measures.activations import active_latents, base_output, group_counts, group_sums, nested_reconstructions
from ...measures.bootstrap import DOCUMENTS
from ...measures.recovered import MEAN, ZERO, DocumentSums, Estimates, columns, increase, mean_of, recovered
from ...result import finite
from ...rows.context_blocks import count_contexts
from ...rows.contexts import Contexts, context_batches
from .result import WITH_ERROR_FILE, Faithfulness, SplicedPrefix
from .table import faithfulness_table


@dataclass
class PassSums:
    """What the contexts that are done come to."""

    n_contexts: int
    sums: DocumentSums
    """The columns are `recovered.columns`."""


class FaithfulnessAnalysis(Analysis[Faithfulness]):
    """The language model's loss with each nested reconstruction in place of the target.

    With `error_term`, y - y_hat is added to each y_hat. The spliced model is then the clean one: a check of the
    machinery, kept in a file of its own.
    """

    name = "faithfulness"
    result = Faithfulness
    shared = ("split", "prefix", "bootstrap", "seed")

    def __init__(self, *, error_term: bool = False) -> None:
        self._error_term = error_term

    @property
    def file(self) -> str:
        """The check has a file of its own."""
        return WITH_ERROR_FILE if self._error_term else Faithfulness.FILE

    def asked(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:
        """How the model's weights are rounded, and whether it is the check."""
        return {"dtype": weight_dtype(shards, config), "error_term": self._error_term, **DOCUMENTS}

    def make(self, job: Job) -> Faithfulness:
        """Run the first contexts of the split through the model."""
        model = load_model(job.shards, job.config)
        splicing = _Splicing(job.transcoder.to(model.device), model, job.shards, error_term=self._error_term)
        done = _pass(splicing, job)
        sums = dict(zip(splicing.columns, done.sums.rows.T, strict=True))
        if float(sums["n"].sum()) == 0:
            raise UserError(
                f"the contexts of {job.shards.path} have no two ordinary tokens in a row; harvest more text"
            )
        estimates = Estimates.of(sums, job.config.bootstrap, job.config.seed)
        return _faithfulness(job.facts, job.transcoder.prefix_ends, done.n_contexts, estimates)

    def tables(self, results: Sequence[Faithfulness]) -> list[ResultTable]:
        """One of each run."""
        return [faithfulness_table(one) for one in results]


def _pass(splicing: _Splicing, job: Job) -> PassSums:
    """The first contexts that hold `config.faithfulness.tokens` rows, run through the model."""
    config, split = job.config, job.shards.split(job.config.split)
    n_contexts, n_rows = count_contexts(split, config.faithfulness.tokens)
    done = PassSums(0, DocumentSums.empty(len(splicing.columns)))
    n_done = job.saved.load(done)
    for context in context_batches(job.shards, split, range(done.n_contexts, n_contexts)[:1], 1):
        job.progress.noted(f"{job.name}: {splicing.estimate(context, n_rows - n_done)}")
    job.progress.started(job.name, n_rows)
    job.progress.advanced(n_done)
    for contexts in context_batches(job.shards, split, range(done.n_contexts, n_contexts), config.lm.batch_tokens):
        done.sums.add(contexts.documents(), splicing.sums_of(contexts))
        done.n_contexts += len(contexts.numbers)
        n_here = int(contexts.replaced.sum())
        n_done += n_here
        job.saved.save_when_due(done, n_done)
        job.progress.advanced(n_here)
    return done


class _Splicing:
    """Runs contexts through the model in all its variants."""

    def __init__(
        self,
        transcoder: Transcoder,
        model: LanguageModel,
        shards: ShardSet,
        *,
        error_term: bool,
    ) -> None:
        self._transcoder, self._model, self._error_term = transcoder, model, error_term
        self.columns = columns(transcoder.prefix_ends)
        self._mean = shards.stats("target").mean.float().to(model.device)

    def estimate(self, context: Contexts, n_rows: int) -> str:
        """How long `n_rows` rows take, from running one context."""
        # The first run on a GPU takes longer: it is made ready.
        if self._model.device.type != "cpu":
            self.sums_of(context)
        began = time.perf_counter()
        self.sums_of(context)
        seconds = time.perf_counter() - began
        rate = int(context.replaced.sum()) / seconds
        return (
            f"about {duration(n_rows / rate)} for {n_rows:,} rows on {self._model.device}, {rate:,.1f} rows/s with one "
            "context at a time; --tokens takes fewer rows"
        )

    def sums_of(self, contexts: Contexts) -> Tensor:
        """Sums over the scored positions of each of `contexts.documents()`, float64 [documents, columns]."""
        passed: list[tuple[Tensor, Tensor]] = []

        def look(x: Tensor, target: Tensor) -> Tensor:
            passed.append((x.detach().clone(), target.detach().clone()))
            return target

        try:
            with edited(self._transcoder, self._model, look):
                clean = self._model.logits(contexts.tokens)
            ((x, target),) = passed
            sums = {"n": contexts.per_document(torch.ones(int(contexts.scored.sum())), contexts.scored)}
            for name, replacement, l0 in self._variants(contexts, x, target):
                sums |= self._compare(contexts, clean, target, name, replacement, l0)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of {self._model.device} does not hold {contexts.tokens.numel()} tokens in this model; run "
                "again with a smaller --set evaluate.lm.batch_tokens=N"
            ) from error
        return torch.stack([sums[name] for name in self.columns], 1)

    def _compare(
        self, contexts: Contexts, clean: Tensor, target: Tensor, name: str, replacement: Tensor, l0: Tensor | None
    ) -> dict[str, Tensor]:
        scored = contexts.scored
        replaced = contexts.replaced.to(target.device)[..., None]
        new = torch.where(replaced, replacement.to(target.dtype), target)
        changed = self._model.logits(contexts.tokens, {self._transcoder.config.target_hook: lambda _: new})
        scores = score(clean, changed, scored, contexts.next_tokens(scored))
        found = {"clean.ce": contexts.per_document(scores.ce_clean, scored)} if name == ZERO else {}
        found |= {
            f"{name}.ce": contexts.per_document(scores.ce, scored),
            f"{name}.kl": contexts.per_document(scores.kl, scored),
            f"{name}.top1": contexts.per_document(scores.same_top, scored),
        }
        return found if l0 is None else {**found, f"{name}.l0": contexts.per_document(l0.cpu()[scored], scored)}

    def _variants(self, contexts: Contexts, x: Tensor, target: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, what the target becomes, active latents of each position) of each variant, in the order of columns."""
        yield ZERO, torch.zeros_like(target), None
        yield MEAN, self._mean.expand(target.shape), None
        rows = x.flatten(0, -2).to(self._transcoder.device)
        active = active_latents(self._transcoder, rows)
        counts = group_counts(self._transcoder, active)
        parts = group_sums(self._transcoder, active, counts)
        nested = nested_reconstructions(base_output(self._transcoder, rows), parts)
        for group, (end, y_hat) in enumerate(zip(self._transcoder.prefix_ends, nested, strict=True), 1):
            y_hat = y_hat.view(target.shape)
            y_hat = y_hat + (target - y_hat) if self._error_term else y_hat
            yield str(end), y_hat, counts[:, :group].sum(1).view(contexts.tokens.shape)


def _faithfulness(
    facts: Mapping[str, Any], prefix_ends: tuple[int, ...], n_contexts: int, estimates: Estimates
) -> Faithfulness:
    return Faithfulness(
        **facts,
        n_contexts=n_contexts,
        n_documents=estimates.n_documents,
        n_tokens=int(estimates.totals["n"]),
        ce_loss_clean=estimates.value(mean_of("clean.ce")),
        ce_loss_ablated_zero=estimates.value(mean_of(f"{ZERO}.ce")),
        ce_loss_ablated_mean=estimates.value(mean_of(f"{MEAN}.ce")),
        kl_ablated_zero=estimates.value(mean_of(f"{ZERO}.kl")),
        kl_ablated_mean=estimates.value(mean_of(f"{MEAN}.kl")),
        prefixes=tuple(_prefix(estimates, group, end) for group, end in enumerate(prefix_ends, 1)),
    )


def _prefix(estimates: Estimates, group: int, end: int) -> SplicedPrefix:
    name = str(end)
    shares = {ablation: recovered(name, ablation) for ablation in (ZERO, MEAN)}
    return SplicedPrefix(
        prefix=group,
        prefix_end=end,
        l0=estimates.value(mean_of(f"{name}.l0")),
        ce_loss_spliced=estimates.value(mean_of(f"{name}.ce")),
        ce_increase=estimates.value(increase(name)),
        ce_recovered_zero=finite(estimates.value(shares[ZERO])),
        ce_recovered_mean=finite(estimates.value(shares[MEAN])),
        kl=estimates.value(mean_of(f"{name}.kl")),
        top1_agreement=estimates.value(mean_of(f"{name}.top1")),
        ce_increase_interval=estimates.interval(increase(name)),
        ce_recovered_zero_interval=estimates.interval(shares[ZERO]),
        ce_recovered_mean_interval=estimates.interval(shares[MEAN]),
        kl_interval=estimates.interval(mean_of(f"{name}.kl")),
    )
