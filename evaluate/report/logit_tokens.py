"""The tokens whose logits a latent raises and lowers most, for its page and for the filter of the browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.errors import UserError

LOGITS_FILE = "logits.parquet"


class LogitTokens:
    """logits.parquet of one run: per latent the tokens of each side, the strongest first."""

    def __init__(self, path: Path, d_sae: int) -> None:
        """Read `path`. Raises UserError when it is broken or not of `d_sae` latents."""
        import pyarrow.parquet as pq
        from pyarrow import ArrowInvalid

        try:
            table = pq.read_table(path, columns=["latent", "side", "rank", "token", "effect"])
        except (OSError, ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and run evaluate logits again") from error
        latent, side, rank, token, effect = (table[name].to_numpy() for name in table.column_names)
        if len(latent) and not 0 <= latent.min() <= latent.max() < d_sae:
            raise UserError(f"{path} is not of {d_sae} latents; delete it and run evaluate logits again")
        order = np.lexsort((rank, -side, latent))
        self._side, self._token, self._effect = side[order], token[order], effect[order]
        self._starts = np.searchsorted(latent[order], np.arange(d_sae + 1))
        self.d_sae = d_sae

    def of(self, latent: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """(token, effect) of the raised and of the lowered tokens, the strongest first."""
        rows = slice(self._starts[latent], self._starts[latent + 1])
        pairs = list(zip(self._token[rows].tolist(), self._effect[rows].tolist(), strict=True))
        n_raised = int((self._side[rows] > 0).sum())
        return pairs[:n_raised], pairs[n_raised:]

    def table(self, text_of: Callable[[int], str]) -> dict[str, Any]:
        """logits.js: each token's text once, then for each latent the places in `texts` of its tokens."""
        places: dict[str, int] = {}

        def place(pairs: list[tuple[int, float]]) -> list[int]:
            return [places.setdefault(text_of(token), len(places)) for token, _ in pairs]

        raised, lowered = [], []
        for latent in range(self.d_sae):
            up, down = self.of(latent)
            raised.append(place(up))
            lowered.append(place(down))
        return {"texts": list(places), "raised": raised, "lowered": lowered}
