"""Attributes: does a frozen representation tell gender or age? A linear probe, beside guessing and beside an untrained encoder.

The representation of a user is the hidden state after their training history. A logistic regression is fitted to four fifths of
the users and asked about the last fifth, five times, so every user is asked about once by a probe that never saw them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.checkpoints import Checkpoint, list_checkpoints, read_checkpoint
from fedssl.data.dataset import Dataset
from fedssl.errors import CatalogueMismatch, DataError, RunFolderError
from fedssl.recommender import Recommender
from fedssl.server_round import first_state
from fedssl_simulations.attacks.bounds import bootstrap
from fedssl_simulations.attacks.membership import area_under_curve
from fedssl_simulations.attacks.result import Figure, Found, statement_line

FOLDS = 5
_USERS_AT_ONCE = 512
_REPEATS = 1000

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """A yes or no about each user who has the attribute. ``is_known_U``: who has it; ``answer_U``: False where it is not known."""

    name: str
    is_known_U: Bools
    answer_U: Bools


def attack_attributes(runs: Sequence[Path], dataset: Dataset, *, attributes: Sequence[str] = ("gender", "age"), seed: int = 0) -> Found:
    """AUC and accuracy of the probe for every run folder and attribute, with 95 % intervals bootstrapped over users.

    Raises RunFolderError for a folder without a finished run, CatalogueMismatch for a run on other items, DataError for an attribute that the data
    does not have.
    """
    questions = [question_of(dataset, name) for name in attributes]
    rows: list[dict[str, Figure | float | int | str]] = []
    notes = [f"{FOLDS}-fold logistic regression on the hidden state after each user's training history; intervals 95 %, bootstrapped over users."]
    promises = {}
    for place, folder in enumerate(runs):
        report, checkpoint = _read(folder, dataset)
        if place == 0:
            untrained = Recommender(checkpoint.recipe, first_state(checkpoint.recipe).weights(checkpoint.recipe))
            rows += _rows("untrained encoder", untrained, None, dataset, questions, seed)
        model = Recommender(checkpoint.recipe, checkpoint.state.released(checkpoint.recipe))
        name = folder.name
        rows += _rows(name, model, report["privacy"], dataset, questions, seed)
        promises[name] = report["privacy"]
        notes.append(f"{name}: {statement_line(report['privacy'])}.")
    return Found("attributes", "What a linear probe reads off the frozen encoder", rows, notes, {"confidence": 0.95, "folds": FOLDS, "privacy": promises})


def question_of(dataset: Dataset, name: str) -> Question:
    """Numbers: above the median? Else: the most frequent value? Raises DataError where nobody has the attribute, or all answers are alike."""
    values = [dataset.user_attributes.get(user, {}).get(name) for user in dataset.histories.names]
    is_known_U = np.array([value is not None for value in values])
    if not is_known_U.any():
        known = sorted({key for attributes in dataset.user_attributes.values() for key in attributes})
        raise DataError(f"no user has the attribute {name!r}; there is {', '.join(known) or 'none: give a file of users as data.users'}")
    try:
        numbers_U = np.array([np.nan if value is None else float(value) for value in values])
        middle = np.nanmedian(numbers_U)
        question, answer_U = f"{name} above {middle:g}", numbers_U > middle
    except ValueError:
        texts = [value for value in values if value is not None]
        most = max(sorted(set(texts)), key=texts.count)
        question, answer_U = f"{name} is {most}", np.array([value == most for value in values])
    if answer_U[is_known_U].all() or not answer_U[is_known_U].any():
        raise DataError(f"all users have the same answer to {question!r}; there is nothing to tell apart")
    return Question(question, is_known_U, answer_U)


def probe(features_UD: Floats, answer_U: Bools, *, seed: int = 0) -> Floats:
    """Log odds of yes for every user, from a probe that was fitted without that user's fold. Shape: (U,)."""
    fold_U = np.random.default_rng(seed).permutation(len(answer_U)) % FOLDS
    odds_U = np.empty(len(answer_U))
    for fold in range(FOLDS):
        fitted = fold_U != fold
        mean, spread = features_UD[fitted].mean(0), features_UD[fitted].std(0)
        scaled_UD = (features_UD - mean) / np.where(spread > 0, spread, 1.0)
        with_one_UD = np.concatenate([scaled_UD, np.ones((len(scaled_UD), 1))], axis=1)
        odds_U[~fitted] = with_one_UD[~fitted] @ logistic_regression(with_one_UD[fitted], answer_U[fitted])
    return odds_U


def logistic_regression(features_ND: Floats, answer_N: Bools, *, penalty: float = 1.0) -> Floats:
    """Weights that minimise log loss + penalty / 2 * |weights|^2, the last one (the constant's) free of it. Newton's method, to 1e-8. Shape: (D,)."""
    N, D = features_ND.shape
    weights_D = np.zeros(D)
    penalty_D = np.full(D, penalty)
    penalty_D[-1] = 0.0
    for _ in range(100):
        odds_N = features_ND @ weights_D
        chance_N = 1 / (1 + np.exp(-odds_N.clip(-500, 500)))
        slope_D = features_ND.T @ (chance_N - answer_N) + penalty_D * weights_D
        bend_DD = (features_ND * (chance_N * (1 - chance_N))[:, None]).T @ features_ND + np.diag(penalty_D + 1e-9)
        step_D = np.linalg.solve(bend_DD, slope_D)
        weights_D -= step_D
        if np.abs(step_D).max() < 1e-8:
            break
    return weights_D


def _rows(
    model_name: str, model: Recommender, privacy: Mapping[str, Any] | None, dataset: Dataset, questions: Sequence[Question], seed: int
) -> list[dict[str, Figure | float | int | str]]:
    features_UD = _features(model, dataset)
    rows: list[dict[str, Figure | float | int | str]] = []
    for question in questions:
        answer_K = question.answer_U[question.is_known_U]
        odds_K = probe(features_UD[question.is_known_U], answer_K, seed=seed)
        is_right_K = ((odds_K > 0) == answer_K).astype(np.float64)
        rows.append(
            {
                "model": model_name,
                "epsilon": f"{privacy['epsilon']:.4g}" if privacy else "none",
                "question": question.name,
                "users": len(answer_K),
                "auc": _area(odds_K, answer_K),
                "accuracy": Figure(float(is_right_K.mean()), *bootstrap(is_right_K, repeats=_REPEATS)),
                "majority": float(max(answer_K.mean(), 1 - answer_K.mean())),
            }
        )
    return rows


def _area(odds_K: Floats, answer_K: Bools) -> Figure:
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(odds_K), len(odds_K)) for _ in range(_REPEATS)]
    low, high = np.quantile([area_under_curve(odds_K[drawn], answer_K[drawn]) for drawn in draws], [0.025, 0.975])
    return Figure(area_under_curve(odds_K, answer_K), float(low), float(high))


def _features(model: Recommender, dataset: Dataset) -> Floats:
    histories = dataset.histories
    parts = []
    for first in range(0, histories.num_users, _USERS_AT_ONCE):
        users = range(first, min(first + _USERS_AT_ONCE, histories.num_users))
        parts.append(model.encode([histories.items[histories.cuts[user] : histories.training_ends[user]] for user in users]).double().numpy())
    return np.concatenate(parts)


def _read(folder: Path, dataset: Dataset) -> tuple[Mapping[str, Any], Checkpoint]:
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints or not (folder / "report.json").exists():
        raise RunFolderError(f"{folder}: no finished run; give the folder of a run that wrote its report.json")
    report: Mapping[str, Any] = json.loads((folder / "report.json").read_text())
    checkpoint = read_checkpoint(folder / "checkpoints" / report["model"]["checkpoint"])
    if checkpoint.catalogue.hash != dataset.catalogue.hash:
        raise CatalogueMismatch(
            f"{folder}: trained on a catalogue of {checkpoint.catalogue.num_items} items, the data has another one of {dataset.catalogue.num_items}; "
            "attack runs on one data set at a time"
        )
    return report, checkpoint
