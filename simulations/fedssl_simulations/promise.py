"""The promise of a run in plain words: what differential privacy it gives, or that it gives none and what a server then sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

_TRUST = {
    "central": "Trust: the server. It receives each chosen user's clipped update and adds the noise itself; the promise covers what it releases.",
    "local": "Trust: nobody. Noise is added on the device, before anything leaves it.",
    "distributed": "Trust: no single party. Each device adds a share of the noise, and only the sum over the cohort is opened.",
    "window": "Trust: nobody. Noise is added on the device, and the promise is about one training window of it.",
}

_NAMES = {
    "unit": "Unit",
    "neighbours": "Neighbours",
    "trust": "Trust",
    "sampling": "Sampling",
    "accountant": "Accountant",
    "epsilon": "Epsilon",
    "delta": "Delta",
    "rounds": "Rounds",
    "noise_multiplier": "Noise / clip norm",
    "clip_norm": "Clip norm",
    "clip_rule": "Clip rule",
    "fleet_users": "Fleet asked about, users",
}


@dataclass(frozen=True)
class Promise:
    """``title`` in a few words, ``sentences`` for anybody, ``facts`` (name, value) for those who check."""

    has_plan: bool
    title: str
    sentences: Sequence[str]
    facts: Sequence[tuple[str, str]]


def promise(privacy: Mapping[str, Any], config: Mapping[str, Any]) -> Promise:
    """From the report's `privacy` (the plan's statement; empty where there was no plan) and the settings of the run.

    A report that was not written yet leaves the settings to speak: a target epsilon or noise means a plan.
    """
    settings = config.get("privacy") or {}
    asked = {name: settings[name] for name in ("epsilon", "delta", "noise_multiplier", "clip_norm", "fleet_users") if settings.get(name)}
    stated = dict(privacy) if privacy else asked
    epsilon, noise = stated.get("epsilon"), stated.get("noise_multiplier")
    has_noise = any(float(z or 0) > 0 for z in (noise.values() if isinstance(noise, Mapping) else [noise]))
    if not (has_noise or _is_number(epsilon)):
        return _no_promise(config, stated)
    unit, is_local = str(stated.get("unit", "user")), stated.get("trust") == "local"
    sentences = [
        f"The unit is one {unit}: {'everything on their device' if unit == 'user' else 'what else is on the device is not covered'}. "
        f"Neighbouring data sets {_neighbours(stated)}."
    ]
    what = ("Whatever is on a device" if is_local else "Taking part") if unit == "user" else f"One {unit} of a device"
    sent = ("all that it sends" if unit == "user" else "all that the device sends") if is_local else "the released models"
    if _is_number(epsilon) and _is_number(stated.get("delta")):
        sentences.insert(
            0,
            f"{what} changes the probability of anything that can be concluded from "
            f"{sent} by at most a factor of e^{epsilon:.4g}"
            f"{f' (about {_about(math.exp(epsilon))})' if epsilon < 10 else ''}, except with probability {_short(stated['delta'])}.",
        )
    if _is_number(epsilon) and epsilon > 20:
        sentences.append("An epsilon this large is no guarantee in practice; read it as a measure of the noise, not as protection.")
    sentences += [str(caveat) for caveat in stated.get("caveats") or _caveats(stated, config)]
    title = f"Differential privacy for each {unit}: ε = {epsilon:.4g}" if _is_number(epsilon) else f"Differential privacy for each {unit}"
    if stated.get("fleet_users"):
        title = f"A question, not a promise: what {title.replace('Differential', 'differential', 1)} would cost a fleet of {stated['fleet_users']:,} users"
    sentences[:0] = [str(warning) for warning in stated.get("warnings") or []]
    return Promise(True, title, sentences, _facts(stated))


def _no_promise(config: Mapping[str, Any], stated: Mapping[str, Any]) -> Promise:
    clip = stated.get("clip_norm")
    sentences = [
        "No noise was added, so no epsilon is promised: neither against whoever gets the model nor against the server.",
        "Histories stay on the devices. A server that follows the protocol but looks (honest but curious) sees each user's exact update"
        f"{', shortened to the clip norm' if clip else ''}, and can read from it which items the user is likely to have met.",
    ]
    if config.get("counts"):
        sentences.append("The item-to-item counts that a user sends say outright which items followed which in their history.")
    sentences.append("A transport that encrypts, as the deployment's does, keeps others from reading along; it hides nothing from the server.")
    return Promise(False, "No differential privacy is promised", sentences, _facts({"clip_norm": clip} if clip else {}))


def _caveats(stated: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What a statement without caveats of its own leaves unsaid."""
    caveats = [_TRUST.get(str(stated.get("trust", "central")), f"Trust: {stated.get('trust')}.")]
    if (config.get("server") or {}).get("sampling") == "poisson":
        caveats.append("Sampling amplifies the promise against whoever sees the models, not against the server or the network, which see who takes part.")
    if config and not (config.get("data") or {}).get("catalogue"):
        caveats.append("The list of items was made from the data and is outside epsilon.")
    return caveats


def _neighbours(stated: Mapping[str, Any]) -> str:
    words = str(stated.get("neighbours", "add/remove one user"))
    if words.startswith("replace "):
        return f"differ in {words.removeprefix('replace ').replace(' by anything else', '')}"
    return f"differ by having or not having one {words.removeprefix('add/remove one ')}" if words.startswith("add/remove one ") else f"are related by: {words}"


def _facts(stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = [name for name in _NAMES if name in stated] + [name for name in stated if name not in _NAMES and name not in ("caveats", "warnings")]
    return [(_NAMES.get(name) or name.replace("_", " ").capitalize(), _shown(stated[name])) for name in names if stated[name] is not None]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_shown(part) for part in value)
    return _short(value) if isinstance(value, float) else str(value)


def _about(factor: float) -> str:
    """Two digits of a factor above 1."""
    return f"{factor:.2g}" if factor < 10 else f"{float(f'{factor:.2g}'):,.0f}"


def _short(value: float) -> str:
    """Six digits; 1e-6 rather than 1e-06."""
    return f"{value:.6g}".replace("e-0", "e-")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
