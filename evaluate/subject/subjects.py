"""What can be named in a comparison: our runs, one of their prefixes, and transcoders of other projects."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matryoshka.checkpoints import find_checkpoint
from matryoshka.errors import UserError
from matryoshka.hook_names import added_hook
from matryoshka.interop.pretrained import from_pretrained, locate
from matryoshka.locations import local_path
from matryoshka.runs import RUN_FILE
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from .compatible import check_compatible
from .shard_set import names_shards, open_shards

GEMMA_SCOPE = "gemma-scope:"
_PREFIX = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True, slots=True)
class Subject:
    """A transcoder in a comparison."""

    name: str
    transcoder: Transcoder

    def digest(self) -> str:
        """sha256 of the weights as they are compared."""
        hasher = hashlib.sha256()
        for key, weight in sorted(self.transcoder.named_parameters()):
            hasher.update(f"{key}{tuple(weight.shape)}".encode())
            hasher.update(weight.detach().cpu().numpy().tobytes())
        return hasher.hexdigest()


def load_subject(text: str, shards: ShardSet) -> Subject:
    """Read RUN or a folder of any format that `Transcoder.from_pretrained` opens, @2 for its first two nested groups.

    `gemma-scope:` before the folder is how Gemma Scope's are shown, and may be left out. Raises UserError when nothing
    of the kind is there or it does not fit the shard set.
    """
    match = _PREFIX.fullmatch(text)
    path, n_groups = (match[1], int(match[2])) if match is not None else (text, None)
    folder = local_path(path.removeprefix(GEMMA_SCOPE))
    form = "ours"
    if folder.exists() and not (folder / RUN_FILE).is_file():
        folder, form = locate(folder)
    if form == "ours":
        checkpoint = find_checkpoint(folder)
        name, transcoder = checkpoint.name, Transcoder.load(checkpoint.folder)
    else:
        transcoder = _load_other_format(folder, form, shards)
        name = folder.resolve().name
    if form == "gemma-scope":
        parts = [part for part in folder.resolve().parts[-4:] if re.match(r"layer_|width_|average_l0_", part)]
        name = GEMMA_SCOPE + ("/".join(parts) or name)
    check_compatible(transcoder, shards, text)
    if n_groups is not None:
        name, transcoder = f"{name}@{n_groups}", cut_prefix(transcoder, n_groups)
    return Subject(name, transcoder)


def shards_of_all(texts: Sequence[str], named: Path | str | None, note: Callable[[str], None]) -> ShardSet:
    """The shard set to measure all of `texts` on: at `named`, else the one that the runs among them were trained on.

    Raises UserError when that is none, or more than one.
    """
    if named is not None:
        return ShardSet.open(named)
    own = [own_shards(text, note) for text in texts]
    found = {shards.digest: shards for shards in own if shards is not None}
    if not found:
        raise no_shards(texts)
    if len(found) > 1:
        raise UserError(
            f"the runs were trained on several shard sets ({', '.join(str(one.path) for one in found.values())}); name "
            "the one to measure all of them on with --shards"
        )
    return next(iter(found.values()))


def no_shards(texts: Sequence[str]) -> UserError:
    """Nothing says what to measure on."""
    return UserError(
        f"no shard set was named, and none of {', '.join(texts)} is a run that names one; pass --shards, for example "
        "--shards data/l17"
    )


def own_shards(text: str, note: Callable[[str], None]) -> ShardSet | None:
    """The shard set that the run `text` was trained on; None where `text` is no run, or one that does not say."""
    match = _PREFIX.fullmatch(text)
    folder = Path(text if match is None else match[1])
    return open_shards(find_checkpoint(folder), None, note) if names_shards(folder) else None


def _load_other_format(folder: Path, form: str, shards: ShardSet) -> Transcoder:
    """A transcoder of another project, under the shard set's names of its model and its target: others write gemma-2-2b
    for google/gemma-2-2b, and mlp.hook_out for hook_mlp_out where that is the same."""
    layer, norm = shards.manifest.source.layer, shards.norm
    transcoder = from_pretrained(folder, layer=layer, norm_kind=None if norm is None else norm.kind)
    if not bool(transcoder.W_dec.any()):
        raise UserError(
            f"the {form} transcoder {folder} is empty for layer {layer}: its decoder is all zeros, none was trained "
            "for it. Compare on a shard set of a layer that has one"
        )
    facts, config = shards.manifest.model, transcoder.config
    own, theirs = str(facts.get("model", "")), config.model
    same_model = not theirs or _last(theirs) == _last(own)
    transcoder.config = config.model_copy(
        update={
            "model": own if same_model else theirs,
            "target_hook": added_hook(config.target_hook, str(facts.get("architecture"))),
        }
    )
    return transcoder


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def cut_prefix(transcoder: Transcoder, n_groups: int) -> Transcoder:
    """The latents of the first `n_groups` groups as a transcoder of one group."""
    shorter = transcoder.prefix(n_groups)
    # What is compared is the whole of it, not its own prefixes.
    shorter.config = shorter.config.model_copy(update={"group_sizes": (shorter.config.d_sae,)})
    return shorter
