"""Whether the text is enough: refused, or said, as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from matryoshka.errors import UserError
from matryoshka.shards import SplitPlan

from .config import HarvestConfig
from .packing import SPLIT_ORDER, Packing, ShardJob, assign_split, document_hash
from .text import documents


def check_text(config: HarvestConfig, dataset: dict[str, Any]) -> None:
    """Raise UserError where no document belongs to one of the splits, which takes no tokenizer to know.

    Reads no further than to the first document of each. Of blocks the tokens decide; there is only no text at all.
    """
    packing = Packing(
        ctx_len=config.ctx_len,
        bos_id=None,  # decides nothing of documents
        val_fraction=config.val_fraction,
        seed=config.seed,
        val_unit=config.val_unit,
    )
    missing = set(SPLIT_ORDER)
    for text in documents(config, dataset):
        missing.discard(assign_split(document_hash(text), 0, packing))
        if not missing or config.val_unit == "block":
            return
    split = next(split for split in SPLIT_ORDER if split in missing)
    raise too_little_text(split, config, packing, dataset, is_special=False)


def too_little_text(
    split: str, config: HarvestConfig, packing: Packing, dataset: dict[str, Any], *, is_special: bool
) -> UserError:
    """What to say when the text has nothing for one of the splits. Reads the text once more, to count it."""
    n_documents = n_own = 0
    for text in documents(config, dataset):
        n_documents += 1
        n_own += assign_split(document_hash(text), 0, packing) == split
    if packing.val_unit == "block":
        found = f"its {n_documents} documents leave nothing for {split}"
    else:
        found = f"{n_own} of its {n_documents} documents belong to {split} (val_fraction {config.val_fraction:g})"
    if is_special:
        why = "all of them special tokens, which are never trained on nor evaluated"
    else:
        why = f"less than one context of {config.ctx_len} tokens"
    block = ", or --val-unit block, which holds out parts of documents" if packing.val_unit == "document" else ""
    return UserError(
        f"the text of {config.dataset} has too little for the {split} split: {found}: {why}. Give more text, a larger "
        f"val_fraction, another --seed, a smaller --ctx-len{block}; nothing was written"
    )


def noting_the_end(
    jobs: Iterable[ShardJob], plans: Mapping[str, SplitPlan], noted: Callable[[str], None]
) -> Iterator[ShardJob]:
    """The same jobs. `noted` is told, once, when a split has fewer contexts than its plan: the whole text was read.

    That is before the last shard of the split goes through the model. Val comes first, so that a text which is too
    short for the plan is mostly known before train begins.
    """
    told = False
    for split, own in groupby(jobs, key=lambda job: job.split):
        plan, n_contexts = plans[split], 0
        for job in own:
            n_contexts += len(job.tokens)
            if len(job.tokens) < plan.shard_contexts[job.shard] and not told:
                noted(_ended(split, n_contexts, plan))
                told = True
            yield job
        if n_contexts < plan.n_contexts and not told:  # it ended where a shard ends
            noted(_ended(split, n_contexts, plan))
            told = True


def _ended(split: str, n_contexts: int, plan: SplitPlan) -> str:
    return (
        f"the text is shorter than --tokens: {split} has {n_contexts:,} of the {plan.n_contexts:,} contexts that were "
        "planned" + (", and train will have about as small a share of its own" if split == "val" else "")
    )
