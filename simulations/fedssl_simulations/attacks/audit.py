"""The audit: canaries through the shipped code, and a lower bound of epsilon beside the claim.

Each canary is in or not by the auditor's coin. What is played is what a run plays: `client_round` behind a Grid, the loop with its ledger,
cohorts from the cohort key, clip, noise, mean; or a device with its key and ledger. The attacker sees all that is released, knows each
canary's part, and names those who were in. What it looks at and from where on it names somebody is fixed before anything is
released. If it is right more often than the claimed epsilon allows, with 99.9 % confidence, then the claim is wrong.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError
from fedssl.privacy.keys import Keys
from fedssl_simulations.attacks import bounds
from fedssl_simulations.attacks.audited_counts import see_counts
from fedssl_simulations.attacks.audited_devices import see_users, see_windows
from fedssl_simulations.attacks.audited_training import see_training
from fedssl_simulations.attacks.result import Figure, Found, statement_line
from fedssl_simulations.attacks.scenarios import Asked, Scenario

CONFIDENCE = 0.999

EVERYBODY = Scenario("everybody, every round", see_training, rate=1.0, releases=2, epsilon=4.0)
SAMPLED = Scenario("secret cohorts", see_training, rate=0.05, releases=32, epsilon=2.0)
FALLS_BACK = Scenario("secret cohorts, a round released again", see_training, rate=0.05, releases=16, epsilon=2.0, falls_back=True)
ADAPTIVE = Scenario("an adaptive clip", see_training, rate=1.0, releases=3, epsilon=4.0, privacy={"clip": "adaptive", "clip_rate": 1.3})
COUNTS = Scenario("a release of counts", see_counts, rate=1.0, releases=1, epsilon=4.0)
LOCAL = Scenario("users who add their own noise", see_users, rate=1.0, releases=2, epsilon=8.0, privacy={"mode": "local"}, share=0.015)
WINDOWS = Scenario("windows on a device, all read", see_windows, rate=1.0, releases=2, epsilon=4.0, privacy={"mode": "window"}, share=0.2)
SAMPLED_WINDOWS = Scenario("windows on a device, secret coins", see_windows, rate=0.05, releases=32, epsilon=2.0, privacy={"mode": "window"}, share=0.2)
SCENARIOS = (EVERYBODY, SAMPLED, FALLS_BACK, ADAPTIVE, COUNTS, LOCAL, WINDOWS, SAMPLED_WINDOWS)


@dataclass(frozen=True)
class Audit:
    """What one audit found. ``named_in`` of ``members`` who took part were named, and ``named_out`` of ``others`` who did not, where the
    attacker's score was above ``threshold``; ``attack`` is the one of several that proves most, and their number is paid for in confidence.
    """

    scenario: Scenario
    claimed: float
    at_least: float
    attack: str
    threshold: float
    named_in: int
    members: int
    named_out: int
    others: int
    seconds: float
    statement: dict[str, Any]

    @property
    def is_refuted(self) -> bool:
        """Whether the claim is wrong, with the confidence of the audit."""
        return self.at_least > self.claimed


def audit(scenario: Scenario, folder: Path, *, canaries: int = 100_000, delta: float = 1e-5, seed: int = 0, keys: Keys | None = None) -> Audit:
    """Play ``scenario`` with a fresh ledger and fresh keys under ``folder``, and bound its epsilon from below.

    ``seed``: the auditor's coins. ``keys``: known ones, for tests alone. Whatever epsilon is claimed comes from the plan and from what was charged.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True)
    seen = scenario.see(scenario, Asked(folder, round(canaries * scenario.share), delta, seed, keys))
    members_N, others_N = seen.was_in_N & seen.is_judged_N, ~seen.was_in_N & seen.is_judged_N
    found = []
    for name, score_N, threshold in seen.guesses:
        hits, alarms = int((score_N[members_N] > threshold).sum()), int((score_N[others_N] > threshold).sum())
        bound = bounds.gaussian_epsilon_at_least if scenario.rate == 1 else bounds.epsilon_at_least
        confidence = 1 - (1 - CONFIDENCE) / len(seen.guesses)
        found.append((bound(hits, int(members_N.sum()), alarms, int(others_N.sum()), delta=delta, confidence=confidence), name, threshold, hits, alarms))
    best, name, threshold, hits, alarms = max(found)
    return Audit(
        scenario=scenario,
        claimed=seen.claimed,
        at_least=best,
        attack=name,
        threshold=threshold,
        named_in=hits,
        members=int(members_N.sum()),
        named_out=alarms,
        others=int(others_N.sum()),
        seconds=time.perf_counter() - began,
        statement={**seen.statement, "epsilon": seen.claimed},
    )


def audit_all(
    folder: Path,
    *,
    canaries: int = 100_000,
    repeats: int = 1,
    only: Sequence[str] = (),
    delta: float = 1e-5,
    seed: int = 0,
    on_done: Callable[[Audit], None] = lambda done: None,
) -> Found:
    """Every scenario, or those named in ``only``, ``repeats`` times each with fresh keys, as one table. Ledgers and keys lie under ``folder`` until
    it returns. Raises ConfigError for a scenario that there is not.

    Those of windows need Opacus; where it is not installed a note says that they were left out.
    """
    names = [scenario.name for scenario in SCENARIOS]
    if unknown := set(only) - set(names):
        raise ConfigError(f"there is no audit of {sorted(unknown)[0]!r}; there is {'; '.join(names)}")
    chosen = [scenario for scenario in SCENARIOS if not only or scenario.name in only]
    possible = [scenario for scenario in chosen if scenario.see is not see_windows or find_spec("opacus") is not None]
    if not possible:
        raise ConfigError("an audit of windows on a device needs Opacus, which is not installed; pip install 'fedssl[window-dp]'")
    groups: list[tuple[str, list[Audit]]] = []
    with tempfile.TemporaryDirectory(dir=folder) as ledgers:
        for scenario in possible:
            done: list[Audit] = []
            for number in range(repeats):
                done.append(audit(scenario, Path(ledgers) / f"{len(groups)}-{number}", canaries=canaries, delta=delta, seed=seed + number))
                on_done(done[-1])
            groups.append((scenario.name, done))
    found = found_of(groups)
    left_out = "Windows on a device were left out: they need Opacus, pip install 'fedssl[window-dp]'."
    return found if possible == chosen else replace(found, notes=[*found.notes, left_out])


def found_of(groups: Sequence[tuple[str, Sequence[Audit]]], *, first_column: str = "rounds") -> Found:
    """Audits, those of like kind together, as a table: the largest bound of each kind beside the claim."""
    rows: list[dict[str, Figure | float | int | str]] = []
    notes = [
        f"A bound above the claim would refute it with {CONFIDENCE:.1%} confidence (one-sided; Clopper-Pearson; threshold and attacks fixed beforehand). "
        "Where all take part the bound takes what is released for one Gaussian; else it holds for releases of any kind, and is loose."
    ]
    for name, done in groups:
        most = max(done, key=lambda one: one.at_least)
        shares = [one.at_least / one.claimed for one in (min(done, key=lambda one: one.at_least), most)]
        rows.append(
            {
                first_column: name,
                "claimed": most.claimed,
                "at least": most.at_least,
                "of the claim": f"{shares[1]:.2f}" if len(done) == 1 else f"{shares[0]:.2f} to {shares[1]:.2f}",
                "refuted": f"{sum(one.is_refuted for one in done)} of {len(done)}",
                "canaries": most.members + most.others,
                "attack": most.attack,
                "hits": _rate(most.named_in, most.members),
                "false alarms": _rate(most.named_out, most.others),
                "seconds": most.seconds,
            }
        )
        notes.append(f"{name}: {statement_line(most.statement)}.")
    canaries = max(one.members + one.others for _, done in groups for one in done)
    delta, repeats = groups[0][1][0].statement["delta"], len(groups[0][1])
    about = {"canaries": canaries, "confidence": CONFIDENCE, "delta": delta, "repeats": repeats}
    return Found("audit", f"Epsilon from below, by up to {canaries:,} canaries through the shipped code", rows, notes, about)


def _rate(named: int, of: int) -> Figure:
    each_side = (1 + CONFIDENCE) / 2
    return Figure(named / of, bounds.at_least(named, of, each_side), bounds.at_most(named, of, each_side))
