"""Recommendations on a device: onnxruntime for the encoder, numpy for the counts, the person's own head added. No torch.

Scores are those of `fedssl.recommender.Recommender` for one history; the tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fedssl.counts import CountsScorer
from fedssl.device_model import give_back_pages, read_device_model
from fedssl.errors import CheckpointError
from fedssl.lift import LiftScorer, LiftTable


@dataclass(frozen=True)
class Recommendation:
    """An item that may come next. ``score`` compares within one list only."""

    item: str
    title: str
    score: float


class DeviceRecommender:
    """A model folder, opened. Raises CheckpointError or CatalogueMismatch where it is not whole.

    ``run``, ``round``: where its weights come from; ``recipe``: what they were trained by.
    """

    def __init__(self, folder: Path):
        model = read_device_model(folder)
        self.recipe, self.catalogue, self._encoder = model.recipe, model.catalogue, model.encoder
        self._counts: CountsScorer | LiftScorer | None = None
        self._mapped: list[NDArray[Any]] = []
        if model.counts is not None and self.recipe.counts is not None:
            self._counts = (LiftScorer if isinstance(model.counts, LiftTable) else CountsScorer)(model.counts, self.recipe.counts)  # type: ignore[arg-type]
            self._mapped = list(vars(model.counts).values())
            self._give_back()
        self._no_head = np.zeros(self.recipe.encoder.width, dtype=np.float32)
        self.refresh()

    def refresh(self) -> None:
        """Read the encoder anew: a training may have left newer weights. Raises CheckpointError, and then goes on with those at hand."""
        options = onnxruntime.SessionOptions()
        # One short history at a time: threads that wait for more would only take memory and power.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(self._encoder), options, providers=["CPUExecutionProvider"])
            about = session.get_modelmeta().custom_metadata_map
            run, round = about["run"], int(about["round"])
        except Exception as error:  # What onnxruntime raises has no common base.
            raise CheckpointError(f"{self._encoder}: cannot be read as a model ({error}); write it again with `fedssl export`") from None
        self._session, self.run, self.round = session, run, round

    def rows(self, items: Sequence[str]) -> NDArray[np.int64]:
        """Catalogue rows of these items, in order. Items that this catalogue does not list are left out."""
        known = self.catalogue.rows
        return np.array([known[item] for item in items if item in known], dtype=np.int64)

    def scores(self, rows: NDArray[np.int64], head_D: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Scores (I + 1,) of all items after a history, oldest first. The first means nothing."""
        recipe = self.recipe
        if self._counts is not None and not recipe.server.rounds and recipe.distillation is None:
            return self._counted(rows)
        encoded: NDArray[np.float32] = self._session.run(["scores"], self._asked(rows, head_D))[0]
        if self._counts is None:
            return encoded
        assert recipe.counts is not None
        total: NDArray[np.float32] = encoded + np.float32(recipe.counts.strength) * self._counted(rows)
        return total

    def step(self, rows: NDArray[np.int64], row: int, head_D: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Where the head goes to expect item ``row`` more after a history, (D,): minus the slope of the encoder's softmax over the whole catalogue.

        For recipes with `[head] adapt`. Counts have no part in it, as in training.
        """
        moved: NDArray[np.float32] = self._session.run(["step"], {**self._asked(rows, head_D), "target": np.array(row, dtype=np.int64)})[0]
        return moved

    def _asked(self, rows: NDArray[np.int64], head_D: NDArray[np.float32] | None) -> dict[str, NDArray[Any]]:
        """The graph's inputs for a history, oldest first."""
        met = rows if len(rows) else np.zeros(1, dtype=np.int64)
        asked: dict[str, NDArray[Any]] = {"rows": met[-self.recipe.encoder.window :], "head": self._no_head if head_D is None else head_D}
        return {**asked, "met": met} if self.recipe.head.history else asked

    def _counted(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self._counts is not None
        scores: NDArray[np.float32] = self._counts([rows])[0]
        self._give_back()
        return scores

    def _give_back(self) -> None:
        """Hold no page of the counts between two answers: a few rows are read at a time, and the system maps them in pieces of up to 2 MB."""
        for array in self._mapped:
            give_back_pages(array)

    def recommend(self, items: Sequence[str], *, k: int, exclude_seen: bool, head_D: NDArray[np.float32] | None = None) -> list[Recommendation]:
        """The ``k`` best items after ``items`` (oldest first), best first; of equal ones the smaller row."""
        rows = self.rows(items)
        scores = self.scores(rows, head_D).copy()
        scores[0] = -np.inf
        if exclude_seen:
            scores[rows] = -np.inf
        k = min(k, self.catalogue.num_items)
        best = np.argpartition(-scores, k - 1)[:k]
        # All that ties with the worst of them, so that the order of rows decides.
        best = np.flatnonzero(scores >= scores[best].min()) if k else best
        order = best[np.lexsort((best, -scores[best]))][:k]
        catalogue = self.catalogue
        listed = [row for row in order.tolist() if scores[row] > -np.inf]
        return [Recommendation(catalogue.tokens[row - 1], catalogue.title(row), float(scores[row])) for row in listed]
