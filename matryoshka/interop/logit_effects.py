"""What `evaluate logits` left beside the samples: the tokens that each latent raises and lowers most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.interop.weight_files import read_json_object

MARK_FILE, EFFECTS_FILE = "logits.json", "logits.parquet"
_COLUMNS = ["latent", "side", "rank", "token", "effect"]

Effects = list[tuple[int, float]]
"""(token id, change of its logit), the strongest first."""


@dataclass(frozen=True, slots=True)
class LogitEffects:
    """Direct effects of all latents that were measured."""

    raised: dict[int, Effects]
    lowered: dict[int, Effects]

    @classmethod
    def open(cls, folder: Path, weights_sha256: str) -> LogitEffects | None:
        """Those in `folder`, or None when there are none or they are of other weights.

        Raises UserError when the table lacks what its mark promises.
        """
        if not (folder / MARK_FILE).is_file():
            return None
        if read_json_object(folder / MARK_FILE).get("transcoder", {}).get("sha256") != weights_sha256:
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / EFFECTS_FILE
        try:
            rows = pq.read_table(path, columns=_COLUMNS).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete {MARK_FILE} and run evaluate logits again"
            ) from None
        found = cls({}, {})
        for row in sorted(rows, key=lambda row: row["rank"]):
            side = found.raised if row["side"] > 0 else found.lowered
            side.setdefault(row["latent"], []).append((row["token"], row["effect"]))
        return found
