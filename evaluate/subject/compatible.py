"""Whether a transcoder and a shard set belong together. Numbers of the wrong pair would look like numbers."""

from __future__ import annotations

import torch

from matryoshka.errors import UserError
from matryoshka.locations import portable_name
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder


def check_compatible(transcoder: Transcoder, shards: ShardSet, name: str) -> None:
    """Raise UserError, naming both sides, unless widths, sites and language model are the same and weights finite."""
    config, manifest = transcoder.config, shards.manifest
    model = manifest.model
    digests = (config.model_digest, model.get("weights_digest"))
    pairs: dict[str, tuple[object, object]] = {
        "source width": (config.d_in, shards.d_in),
        "target width": (config.d_out, shards.d_out),
        "source site": (config.source_hook, manifest.source.hook_point),
        "target site": (config.target_hook, manifest.target.hook_point),
    }
    if None not in digests:  # a name says less, and may be that of another model, or of the same by another path
        pairs["weights of the language model"] = digests
    else:
        pairs["language model"] = (portable_name(config.model), portable_name(str(model.get("model", ""))))
        if config.model_revision is not None and model.get("revision") is not None:
            pairs["model revision"] = (config.model_revision, model["revision"])
    differences = [f"{what} {own!r} against {theirs!r}" for what, (own, theirs) in pairs.items() if own != theirs]
    if differences:
        raise UserError(
            f"the transcoder {name} and the shard set {shards.path} do not belong together: {'; '.join(differences)}. "
            "Evaluate on a shard set of the same model and sites, harvested by `harvest run`"
        )
    broken = [key for key, weight in transcoder.named_parameters() if bool(torch.isnan(weight).any())]
    if broken:
        raise UserError(f"the transcoder {name} holds NaN in {', '.join(broken)}: its training diverged; train again")
