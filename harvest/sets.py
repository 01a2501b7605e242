"""The shard sets of one harvest: what is asked for, what is there already, and where the two differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.held_out import ValUnit
from matryoshka.lm import LanguageModel
from matryoshka.norms import Norm
from matryoshka.runs import changed_fields, provenance, refuse_changes
from matryoshka.shards import Manifest, ShardSet, SiteFacts, SplitPlan, extend_splits, plan_splits
from matryoshka.shards.manifest import NormFacts
from matryoshka.shards.records import has_manifest, read_manifest, read_records
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_open import open_storage
from matryoshka.shards.writer import check_storage
from matryoshka.sites import HookPair, Site

from .config import HarvestConfig
from .same_model import model_facts, same_spelling


@dataclass(frozen=True, slots=True)
class HarvestResult:
    """What a harvest leaves behind in one folder."""

    path: Path | str
    n_shards_written: int
    """0 when an earlier run had finished the set."""
    n_tokens: int
    n_tokens_planned: int
    bytes_on_disk: int
    measured: dict[str, float]
    """As in the manifest: compression ratio, and errors of a lossy codec."""
    val_unit: ValUnit = "document"
    """As in the manifest: what val is made of."""
    skipped_lines: Mapping[str, int] = field(default_factory=dict)
    """As in the manifest: broken lines of each file that were left out."""


@dataclass(frozen=True)
class Target:
    """One shard set that a harvest is to make."""

    config: HarvestConfig
    """The settings as if this set were harvested alone."""

    @cached_property
    def folder(self) -> Path | str:
        """Where it is: a folder, or a URL."""
        return self.config.folder()

    @cached_property
    def storage(self) -> Storage:
        """The same, to work in."""
        return open_storage(self.folder)

    @cached_property
    def pair(self) -> HookPair:
        """What is kept."""
        return self.config.pair()

    @property
    def hook_points(self) -> tuple[str, str]:
        """Where the source and the target are read in the model."""
        return self.pair.source.hook_point, self.pair.target.hook_point

    def begun(self) -> Manifest | None:
        """The manifest of what is there already, finished or not.

        Raises UserError when the folder cannot be used, or holds a set of other settings; more tokens are no others.
        """
        check_storage(self.storage)
        if not has_manifest(self.storage):
            return None
        saved = read_manifest(self.storage)
        wanted = {**same_spelling(saved, self.config.content()), "val_unit": self.config.val_unit}
        if isinstance(had := saved.settings.get("tokens"), int) and had < self.config.tokens:
            wanted["tokens"] = had
        changes = changed_fields({**saved.settings, "val_unit": saved.val_unit}, wanted)
        if (saved.val_unit, self.config.val_unit) == ("block", "document") and len(changes) == 1:
            raise UserError(
                f"{self.folder} holds out blocks of documents, as sets made before --val-unit all do, and this harvest "
                "asks for whole documents. Pass --val-unit block to continue it, or --out with a new folder for a "
                "set whose val documents train never sees; nothing was changed"
            )
        refuse_changes(self.folder, "harvested", changes)
        return saved

    def is_finished(self) -> bool:
        """Whether the whole set is there. Raises UserError as `begun` does."""
        saved = self.begun()
        if saved is None or not saved.complete or saved.settings.get("tokens") != self.config.tokens:
            return False
        return len(read_records(self.storage)) == sum(plan.n_shards for plan in saved.splits.values())

    def norm(self, lm: LanguageModel) -> Norm | None:
        """The norm behind the source site, if there is one."""
        return lm.norm_before(self.pair.source.name, self.pair.source.layer)

    def check_fits(self, lm: LanguageModel) -> None:
        """Raise UserError unless the model has these layers and positions."""
        config = self.config
        if self.pair.deepest_layer >= lm.n_layers:
            raise UserError(
                f"layer {self.pair.deepest_layer} does not exist: {config.model} has {lm.n_layers} layers, 0 to "
                f"{lm.n_layers - 1}; choose another --layer"
            )
        if lm.n_ctx is not None and config.ctx_len > lm.n_ctx:
            raise UserError(f"ctx_len = {config.ctx_len} is more than the {lm.n_ctx} positions of {config.model}")

    def manifest(self, lm: LanguageModel, dataset: dict[str, Any]) -> Manifest:
        """The manifest with which to open the set; the plan of a begun set stays, and grows with the tokens."""
        config = self.config
        norm = self.norm(lm)
        facts = None if norm is None else NormFacts(kind=norm.kind, eps=norm.eps, has_bias=norm.bias is not None)
        bos_id = bos_of(config, lm)
        saved = self.begun()
        return Manifest(
            model=model_facts(saved, lm, {self.pair.source.layer, self.pair.target.layer}, self.folder),
            dataset=dataset,
            source=_site_facts(self.pair.source, lm),
            target=_site_facts(self.pair.target, lm),
            ctx_len=config.ctx_len,
            bos_id=bos_id,
            special_ids=tuple(sorted({*lm.special_ids} | ({bos_id} if bos_id is not None else set()))),
            norm=facts,
            codec=config.codec,
            splits=self._plan(lm.d_model),
            settings=config.content() if saved is None else same_spelling(saved, config.content()),
            versions=provenance(),
        )

    def result(self, n_written: int) -> HarvestResult:
        """What is there now. The set must be finished."""
        shards = ShardSet.open(self.storage)
        n_contexts = shards.train.n_contexts + shards.val.n_contexts
        return HarvestResult(
            path=self.folder,
            n_shards_written=n_written,
            n_tokens=n_contexts * shards.ctx_len,
            n_tokens_planned=-(-self.config.tokens // self.config.ctx_len) * self.config.ctx_len,
            bytes_on_disk=shards.bytes_on_disk(),
            val_unit=shards.val_unit,
            skipped_lines=shards.manifest.skipped_lines,
            measured=shards.manifest.measured,
        )

    def _plan(self, width: int) -> dict[str, SplitPlan]:
        config = self.config
        n_contexts = -(-config.tokens // config.ctx_len)
        saved = self.begun()
        if saved is None:
            return plan_splits(n_contexts, config.val_fraction, config.ctx_len, width)
        if saved.settings.get("tokens") == config.tokens:
            # Shards of another size would not fit the arrays there are; and if the text ended early, it ends there.
            return saved.splits
        return extend_splits(saved.splits, n_contexts, config.val_fraction, config.ctx_len, width)


def bos_of(config: HarvestConfig, lm: LanguageModel) -> int | None:
    """The token that every context starts with."""
    if config.bos == "auto":
        return lm.bos_id
    if config.bos == "none":
        return None
    if config.bos >= len(lm.tokenizer):
        raise UserError(f"bos = {config.bos} is no token of {config.model}, which has 0 to {len(lm.tokenizer) - 1}")
    return config.bos


def pad_of(config: HarvestConfig, lm: LanguageModel) -> int | None:
    """The special token that fills up contexts, or None when documents are laid end to end."""
    if config.pack:
        return None
    choices = (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id, *lm.special_ids)
    pad = next((choice for choice in choices if choice is not None and choice in lm.special_ids), None)
    if pad is None:
        raise UserError(f"{config.model} has no special token to fill up contexts with; leave --no-pack out")
    return pad


def _site_facts(site: Site, lm: LanguageModel) -> SiteFacts:
    return SiteFacts(site=site.name, layer=site.layer, hook_point=site.hook_point, width=lm.d_model)
