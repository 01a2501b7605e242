"""The rows of one batch on the training device, brought into what each member of the fleet reads."""

from __future__ import annotations

import torch
from torch import Tensor

from .conditioning import Conditioning
from .stream import Batch


class Rows:
    """One batch, resident for all members; those that share an input convention and conditioning share its x."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._source = batch.source.to(device, non_blocking=True)
        self._target = batch.target.to(device, non_blocking=True)
        self._x: dict[int, Tensor] = {}
        self._y: dict[float, Tensor] = {}

    def x(self, conditioning: Conditioning) -> Tensor:
        """x_hat [batch_rows, d_in], float32."""
        key = id(conditioning)
        if key not in self._x:
            self._x[key] = conditioning.input(self._source)
        return self._x[key]

    def y(self, conditioning: Conditioning) -> Tensor:
        """y_hat [batch_rows, d_out], float32."""
        if conditioning.s_y not in self._y:
            self._y[conditioning.s_y] = conditioning.target(self._target)
        return self._y[conditioning.s_y]
