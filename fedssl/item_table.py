"""The item rows that U users hold while they train, and the slope of the loss at them.

A user carries the DISTINCT rows it touches, not the catalogue: ``[padding | own items | drawn candidates]``; or, where a
loss ranks the whole catalogue, all rows. Slopes at rows are added up here, beside autograd, because a gradient through
an expanded table would copy it once an operation. Filler points at row 0, and the slope of row 0 is exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class ItemTable:
    """Rows (U, K, D), shared by an expanded view or one set a user; ``slope`` is theirs, filled by the backward pass.

    Softmax losses score every column but that of the padding, each with its bias added: 0 for an own item, the log of how many
    items a drawn candidate stands for, -inf for filler. A bias of None: the rows are the whole catalogue.
    """

    def __init__(self, rows_UKD: Tensor, *, bias_UN: Tensor | None = None):
        self.rows_UKD = rows_UKD
        self.bias_UN = bias_UN
        self._slope: Tensor | None = None
        # Autograd only calls the backward of a function that has an input to differentiate.
        self.anchor = torch.zeros((), dtype=rows_UKD.dtype, requires_grad=True)

    @property
    def ranks_all(self) -> bool:
        """Whether the candidates are the whole catalogue."""
        return self.bias_UN is None

    @property
    def slope_UKD(self) -> Tensor:
        """The slope gathered so far; zeros where nothing was."""
        if self._slope is None:
            self._slope = torch.zeros(self.rows_UKD.shape, dtype=self.rows_UKD.dtype)
        return self._slope

    def look_up(self, ids_UM: Tensor) -> Tensor:
        """The rows with these numbers, (U, M) -> (U, M, D); their slope goes to this table."""
        result: Tensor = _LookUp.apply(self.anchor, self, ids_UM)  # type: ignore[no-untyped-call]
        return result

    def gather(self, ids_UM: Tensor) -> Tensor:
        """The same rows without a slope."""
        U, K, D = self.rows_UKD.shape
        if U == 1 or self.rows_UKD.stride(0) == 0:
            return rows_at(self.rows_UKD[0], ids_UM)
        return rows_at(self.rows_UKD.reshape(-1, D), self._flat(ids_UM)).view(*ids_UM.shape, D)

    def add_slope(self, slope_UKD: Tensor) -> None:
        """Take a whole slope; the tensor is kept, not copied, when it is the first."""
        self._slope = slope_UKD if self._slope is None else self._slope.add_(slope_UKD)

    def add_slope_at(self, ids_UM: Tensor, slope_UMD: Tensor) -> None:
        """Take the slope at single rows; a row named twice adds up."""
        total = self.slope_UKD
        total.view(-1, total.shape[-1]).index_add_(0, self._flat(ids_UM), slope_UMD.reshape(-1, total.shape[-1]))

    def finish(self) -> Tensor:
        """The whole slope, with row 0 exactly 0."""
        self.slope_UKD[:, 0] = 0.0
        return self.slope_UKD

    def _flat(self, ids_UM: Tensor) -> Tensor:
        U, K, _ = self.rows_UKD.shape
        return (ids_UM + torch.arange(U)[:, None] * K).reshape(-1)


def rows_at(table_ID: Tensor, ids: Tensor) -> Tensor:
    """``table_ID[ids]`` in half the time: whole rows are copied. Shape: that of ``ids``, and D."""
    return table_ID.index_select(0, ids.reshape(-1)).view(*ids.shape, table_ID.shape[1])


class _LookUp(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: ItemTable, ids_UM: Tensor) -> Tensor:
        ctx.table, ctx.ids = table, ids_UM
        return table.gather(ids_UM)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        ctx.table.add_slope_at(ctx.ids, slopes[0])
        return None, None, None
