"""`evaluate logits`: the direct effect of every latent on the logits, as a table on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.runs import make_directory
from matryoshka.shards import ShardSet

from ..analysis import load_transcoder
from ..checkpoint import find_checkpoint
from ..config import EvaluateConfig
from ..result import ShardSetFacts, TranscoderFacts, already_answered, result_folder
from .logit_effects import token_effects
from .logits_file import LOGITS_FILE, LogitsMark, logits_identity, read_logits_mark, write_logits
from .model import load_model, weight_dtype


@dataclass(frozen=True, slots=True)
class Effects:
    """A logits.parquet and how it came about."""

    path: Path
    mark: LogitsMark
    is_new: bool
    """False when it was there already."""
    replaced: tuple[str, ...] = ()
    """How an older one in the same place differed."""


def make_logits(run: Path, config: EvaluateConfig) -> Effects:
    """Write logits.parquet beside the report of `run`; one that already answers is only read.

    Raises UserError for what the user can mend, and for a language model whose logits are not made of a known norm and
    one matrix.
    """
    if config.shards is None:
        raise UserError("no shard set was named; pass --shards, for example --shards data/l17")
    shards, checkpoint = ShardSet.open(config.shards), find_checkpoint(run)
    # Neither the rows nor the prefix change what a latent does to the logits.
    config = config.model_copy(update={"split": "val", "prefix": None})
    transcoder = load_transcoder(checkpoint, shards, config)
    folder = result_folder(checkpoint, shards, config)
    facts = TranscoderFacts.of(checkpoint, transcoder), ShardSetFacts.of(shards)
    settings = {"top": config.logits.top, "dtype": weight_dtype(shards, config)}
    existing, changes = already_answered(read_logits_mark(folder), logits_identity(*facts, settings))
    if existing is not None and (folder / LOGITS_FILE).is_file():
        return Effects(folder / LOGITS_FILE, existing, is_new=False)
    make_directory(folder)
    model = load_model(shards, config)
    unembedding = model.unembedding
    n_tokens = min(len(model.tokenizer), len(unembedding.W_U))
    mark = LogitsMark(
        transcoder=facts[0], shard_set=facts[1], settings=settings, norm=unembedding.norm.kind, n_tokens=n_tokens
    )
    effects = token_effects(transcoder.W_dec, unembedding, n_tokens, config.logits.top)
    return Effects(write_logits(folder, mark, effects), mark, is_new=True, replaced=changes)
