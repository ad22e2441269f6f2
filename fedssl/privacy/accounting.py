"""Epsilon of Poisson-sampled Gaussian sums, by privacy loss distributions. The only file that imports dp-accounting.

dp-accounting makes the distribution of one round (connect-the-dots, Doroshenko et al. 2022,
https://arxiv.org/abs/2207.04380: an upper bound, never below the truth). A run asks for epsilon after every round, so
the composition of n rounds is done here, as the library does it (a power in Fourier space, cut where Chernoff's bound
leaves 1e-15, and that mass counted as infinite loss) with the parts that do not depend on n kept. Tests hold
it against the library's own composition. Neighbours add or remove one user; both directions are composed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError

GRID = 1e-4
"""Discretisation of privacy losses: coarser grids overstate small epsilons of many rounds."""

MIXTURE_GRID = 1e-3
"""That of mixtures, of which every point is searched for: a coarser grid overstates, never the reverse."""

LARGE, LITTLE_NOISE = 50.0, 0.05
"""An epsilon and a noise multiplier: beyond the one, without sampling or with less than the other, a closed form answers for the grid."""

_TAIL = 1e-15


def combined_noise(multipliers: Sequence[float]) -> float:
    """Sums of one exchange as one Gaussian: 1/z^2 = sum of 1/z_i^2. A sum without noise leaves none."""
    if min(multipliers) <= 0:
        return 0.0
    return 1 / math.sqrt(sum(1 / z**2 for z in multipliers))


def epsilon(events: Sequence[tuple[float, float, int]], delta: float) -> float:
    """The smallest epsilon that all the events together keep at ``delta``.

    Guarantees:
      - never below the truth; more releases or less noise never make it smaller (beyond 1e-9 of rounding);
      - no release costs 0; a release without noise costs infinity.
    Events are (rate, noise multiplier, count): ``count`` releases of a Gaussian sum, each over a cohort drawn anew, every
    user with chance ``rate``. Raises ValueError for a rate outside (0, 1] or a negative number.

    Where hardly any noise is added the grid of losses would fill the memory: an epsilon above `LARGE` is that of the same releases without
    sampling, in closed form, where none is sampled (it is exact) or one has less noise than `LITTLE_NOISE` (sampling only helps).
    """
    merged: dict[tuple[float, float], int] = {}
    for rate, z, count in events:
        if not 0 < rate <= 1 or not z >= 0 or count < 0:
            raise ValueError(f"event (rate {rate}, noise multiplier {z}, count {count}): wanted a rate in (0, 1] and no negative numbers")
        if count:
            merged[rate, z] = merged.get((rate, z), 0) + count
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not between 0 and 1")
    if merged and (all(rate == 1 for rate, _ in merged) or min(z for _, z in merged) < LITTLE_NOISE):
        whole = gaussian_epsilon(combined_noise([z / math.sqrt(count) for (_, z), count in merged.items()]), 1, delta)
        if whole > LARGE:
            return whole
    return _epsilon(tuple(sorted(merged.items())), delta)


def windows_epsilon(rate: float, noise_multiplier: float, count: int, delta: float, *, windows: int) -> float:
    """Epsilon for ``windows`` training windows that are there or not, together, over ``count`` steps in which each is read on its own with chance ``rate``.

    So many windows move a step's sum by 0, 1, 2, ... clips, with the chances of a binomial; ``windows`` times epsilon of one window is no bound
    for that. Guarantee: never below the truth. Source: Ganesh 2024, https://arxiv.org/abs/2401.10294 (a mixture of Gaussians).
    """
    _check_windows(rate, count, windows)
    return max(_epsilon_of(losses, delta) for losses in _of_windows(rate, noise_multiplier, count, windows)) if count else 0.0


def event_epsilon(rate: float, noise_multiplier: float, count: int, delta: float, *, windows: int) -> float:
    """Epsilon for one event whose item is replaced by another, where at most ``windows`` windows read it, as input or as target.

    Each of these is read on its own with chance ``rate`` in each of ``count`` steps. All of them are taken away and others come: epsilon of the
    one and of the other add up, through the data without either (group privacy; delta of the second weighs e^epsilon of the first). A replacement
    can be told from either side, so no one direction of a sampled Gaussian of twice the clip bounds it once steps compose; without sampling it does.

    Guarantee: never below the truth. To delete or insert an event is another matter: it shifts the cuts of all later windows, and nothing is claimed.
    """
    _check_windows(rate, count, windows)
    # Sampling only helps: without it the sum moves by up to two clips a window.
    best = gaussian_epsilon(noise_multiplier / (2 * windows), count, delta)
    if rate == 1 or count == 0:
        return best
    removed, added = _of_windows(rate, noise_multiplier, count, windows)
    for share in np.geomspace(1e-3, 0.999, 16):
        first = _epsilon_of(removed, delta * share)
        best = min(best, first + _epsilon_of(added, delta * (1 - share) * math.exp(-first)))
    return float(best)


def _check_windows(rate: float, count: int, windows: int) -> None:
    if windows < 1 or count < 0 or not 0 < rate <= 1:
        raise ValueError(f"{windows} windows at rate {rate}, {count} steps: wanted at least one window, a rate in (0, 1] and no negative number")


def gaussian_epsilon(noise_multiplier: float, count: int, delta: float) -> float:
    """Epsilon of ``count`` Gaussian releases without sampling, exactly, rounded up by at most 1e-9. Needs no library.

    ``noise_multiplier``: noise over sensitivity. Source: Balle and Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8.
    """
    if count == 0:
        return 0.0
    if noise_multiplier <= 0:
        return math.inf
    mu = math.sqrt(count) / noise_multiplier
    low, high = 0.0, 1.0
    if _gaussian_delta(0.0, mu) <= delta:
        return 0.0
    while _gaussian_delta(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * max(high, 1e-3):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta(middle, mu) > delta else (low, middle)
    return high


def solve_gaussian_noise(epsilon_target: float, delta: float, count: int) -> float:
    """The smallest noise multiplier, rounded up to five digits, with which ``count`` releases without sampling stay within the target."""
    low, high = 1e-6, 1.0
    while gaussian_epsilon(high, count, delta) > epsilon_target:
        low, high = high, 2 * high
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gaussian_epsilon(middle, count, delta) > epsilon_target else (low, middle)
    return round_up(high)


def _gaussian_delta(epsilon: float, mu: float) -> float:
    """delta of a Gaussian of that mu: Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)."""
    x = -mu / 2 - epsilon / mu
    if x > -30:
        log_rest = math.log(math.erfc(-x / math.sqrt(2)) / 2)
    else:
        # erfc runs out of digits; the first terms of its series, cut after a negative one, lie below it, so delta lies above.
        log_rest = -(x**2) / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-(x**-2) + 3 * x**-4 - 15 * x**-6)
    return math.erfc(-(mu / 2 - epsilon / mu) / math.sqrt(2)) / 2 - math.exp(epsilon + log_rest)


@lru_cache(maxsize=64)
def solve_noise(epsilon_target: float, delta: float, q: float, n: int, other_events: tuple[tuple[float, float, int], ...] = ()) -> float:
    """The smallest noise multiplier (to 1e-3, rounded up) with which ``n`` releases at rate ``q``, beside ``other_events``, stay within the target.

    It never overspends. Raises ConfigError when the other events alone spend the target.
    """
    if epsilon(other_events, delta) >= epsilon_target:
        raise ConfigError(f"epsilon {epsilon_target} at delta {delta} is already spent by the other sums of the plan; give them a smaller share")

    def excess(log_z: float) -> float:
        return math.log(max(epsilon([(q, math.exp(log_z), n), *other_events], delta), 1e-12) / epsilon_target)

    # Epsilon over noise is close to a straight line on log-log paper: follow the newest two points (the secant), keep a
    # bracket, and step a little beyond the crossing, on the side where the bracket is wide.
    low, high = -math.inf, math.inf  # overspends at low, does not at high
    before: tuple[float, float] | None = None
    here = math.log(_first_guess(epsilon_target, delta, q, n, other_events))
    for _ in range(200):
        value = excess(here)
        low, high = (here, high) if value > 0 else (low, here)
        if high - low <= 8e-4:
            break
        step = value if math.isfinite(value) else 1.0
        if before is not None and math.isfinite(before[1]) and value * (here - before[0]) * (value - before[1]) != 0:
            step = -value * (here - before[0]) / (value - before[1])
        before = (here, value)
        is_bracketed = math.isfinite(low) and math.isfinite(high)
        crossing = here + (step if is_bracketed else math.copysign(min(max(1.2 * abs(step), 0.01), 0.4), value))
        if is_bracketed:
            crossing += 3e-4 if high - crossing > crossing - low else -3e-4
            if not low < crossing < high or high - low > 1:
                crossing = (low + high) / 2
        here = crossing
    assert high - low <= 8e-4, "epsilon does not fall with the noise"
    return round_up(math.exp(high))


def round_up(value: float, digits: int = 5) -> float:
    """``value`` up to that many significant digits, so that another machine's last bits solve to the same number."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")


def _first_guess(target: float, delta: float, q: float, n: int, others: Sequence[tuple[float, float, int]]) -> float:
    """A start, never a claim: sampled Gaussians add up in mu^2 (Bu et al. 2020, https://arxiv.org/abs/1911.11607)."""
    # mu^2 / 2 + mu * tail = epsilon, roughly.
    tail = math.sqrt(2 * math.log(1 / delta)) * 0.9
    whole = (math.sqrt(tail**2 + 2 * target) - tail) ** 2
    spent = sum(rate**2 * count * math.expm1(min(z**-2, 50.0)) if rate < 1 else count / z**2 for rate, z, count in others)
    share = max(whole - spent, whole / 20) / (q**2 * n)
    return 1 / math.sqrt(math.log1p(share) if q < 1 else share)


@dataclass(frozen=True, eq=False)
class _Losses:
    """Privacy losses on the grid, in one direction: probability of (lowest + i) * grid, and of an infinite loss."""

    lowest: int
    probs: NDArray[np.float64]
    infinite: float
    grid: float = GRID

    @cached_property
    def _orders(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Orders of Chernoff's bound, and the log moments there: they do not depend on how often we compose."""
        size = len(self.probs)
        orders = np.concatenate((np.arange(-20, 0), np.arange(1, 21))) / size
        places = np.arange(size)
        shift = np.maximum(orders, 0) * (size - 1)
        moments = [math.log(self.probs @ np.exp(places * order - at)) + at for order, at in zip(orders, shift, strict=True)]
        return orders, np.array(moments)

    def times(self, count: int) -> _Losses:
        """The losses of ``count`` independent releases."""
        if count == 1:
            return self
        from scipy import fft

        orders, moments = self._orders
        bounds = (count * moments + math.log(2 / _TAIL)) / orders
        last = min((len(self.probs) - 1) * count, math.ceil(bounds[orders > 0].min()))
        first = max(0, math.floor(bounds[orders < 0].max()))
        size = fft.next_fast_len(max(last - first + 1, len(self.probs)), real=True)
        power = _power(fft.rfft(self.probs, size), count)
        # The transform wraps around; what Chernoff lets wrap is counted as infinite loss.
        probs = np.roll(fft.irfft(power, size), -(first % size))[: last - first + 1]
        infinite = _TAIL - math.expm1(count * math.log1p(-self.infinite))
        return _Losses(self.lowest * count + first, np.maximum(probs, 0.0), infinite, self.grid)

    def plus(self, other: _Losses) -> _Losses:
        """The losses of both."""
        from scipy import signal

        probs = np.maximum(signal.fftconvolve(self.probs, other.probs), 0.0)
        return _Losses(self.lowest + other.lowest, probs, self.infinite + other.infinite - self.infinite * other.infinite)

    @cached_property
    def deltas(self) -> NDArray[np.float64]:
        """delta(epsilon) at every epsilon of the grid: infinite + sum over larger losses of p (1 - e^(epsilon - loss))."""
        from scipy import signal

        backwards = self.probs[::-1]
        # The sum of p e^(epsilon - loss) obeys D_k = p_k + e^-grid D_(k+1): a filter, in which nothing overflows.
        discounted = signal.lfilter([1.0], [1.0, -math.exp(-self.grid)], backwards)
        return np.asarray(self.infinite + (np.cumsum(backwards) - discounted)[::-1])

    def delta_at(self, place: int) -> float:
        """delta at epsilon = place * grid."""
        index = place - self.lowest
        if index >= len(self.probs):
            return self.infinite
        if index < 0:
            # Below the lowest loss every p counts: p - p e^(epsilon - lowest) e^(lowest - loss).
            total = float(self.probs.sum())
            return self.infinite + total - math.exp(index * self.grid) * (total - float(self.deltas[0]) + self.infinite)
        return float(self.deltas[index])


def _epsilon_of(losses: _Losses, delta: float) -> float:
    """Smallest epsilon >= 0 with delta(epsilon) <= delta, found on the grid and refined between two of its points."""
    if losses.infinite > delta:
        return math.inf
    if losses.delta_at(0) <= delta:
        return 0.0
    low, high = 0, losses.lowest + len(losses.probs)  # delta_at(low) > delta >= delta_at(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if losses.delta_at(middle) > delta else (low, middle)
    # Between two points of the grid delta is a straight line in e^epsilon.
    above, below = losses.delta_at(low), losses.delta_at(high)
    return low * losses.grid + math.log1p((above - delta) / (above - below) * math.expm1(losses.grid))


@lru_cache(maxsize=1024)
def _epsilon(merged: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    if not merged:
        return 0.0
    if any(z == 0 for (_, z), _ in merged):
        return math.inf
    # Without sampling, adding a user and removing one lose alike.
    directions = (0,) if all(rate == 1 for (rate, _), _ in merged) else (0, 1)
    return max(_epsilon_of(_composed(merged, direction), delta) for direction in directions)


def _composed(merged: tuple[tuple[tuple[float, float], int], ...], direction: int) -> _Losses:
    first, *rest = (_one_round(rate, z)[direction].times(count) for (rate, z), count in merged)
    for more in rest:
        first = first.plus(more)
    return first


@lru_cache(maxsize=8)
def _one_round(rate: float, z: float) -> tuple[_Losses, _Losses]:
    """One round's losses when the user is removed, and when added."""
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.privacy_accountant import NeighboringRelation

    made = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=z, value_discretization_interval=GRID, sampling_prob=rate, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    removed = _read(made._pmf_remove)
    return removed, removed if rate == 1 else _read(made._pmf_add)


@lru_cache(maxsize=4)
def _of_windows(rate: float, z: float, count: int, windows: int) -> tuple[_Losses, _Losses]:
    """The losses of ``count`` steps when so many windows are removed, and when they are added."""
    from dp_accounting.pld import privacy_loss_distribution
    from scipy import stats

    if windows == 1 or rate == 1:
        removed, added = _one_round(rate, z / windows)
    else:
        moves = np.arange(windows + 1)
        chances = stats.binom.pmf(moves, windows, rate)
        made = privacy_loss_distribution.from_mixture_gaussian_mechanism(z, moves.astype(float), chances, value_discretization_interval=MIXTURE_GRID)
        removed, added = _read(made._pmf_remove, MIXTURE_GRID), _read(made._pmf_add, MIXTURE_GRID)
    return removed.times(count), added.times(count)


def _read(pmf: Any, grid: float = GRID) -> _Losses:
    dense = pmf.to_dense_pmf()
    return _Losses(int(dense._lower_loss), np.asarray(dense._probs, dtype=np.float64), float(dense._infinity_mass), grid)


def _power(values: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
    """values ** exponent by squaring: four times as fast as numpy's complex power, and as exact."""
    result, square = None, values
    while exponent:
        if exponent & 1:
            result = square if result is None else result * square
        exponent >>= 1
        square = square * square if exponent else square
    assert result is not None
    return result
