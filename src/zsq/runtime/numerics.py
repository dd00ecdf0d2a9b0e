"""How far what a file computes is from the simulation that was quantized, and from the float network."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsq.runtime.worker import Array

Labels = np.ndarray[Any, np.dtype[np.int64]]
"""Class indices (N,)."""

__all__ = ["Distance", "Labels", "distance", "snr"]

_EQUAL = 200.0
"""Decibels that stand for no difference: float32 itself has about 150."""
_SNR_LOSS = 1.0
"""Decibels by which a file may be farther from the float network than the simulation is."""
_TOP1_LOSS = 1.0
"""Points of top-1 that a file may lose against the simulation, besides what chance explains."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """What one runtime computed on a set of images; shares in percent, signal-to-noise ratios in decibels.

    Integer kernels round where a simulation in float does not, and one step of a coarse grid is large: a right file may
    be farther from the simulation than the simulation is from the float network. What must not happen is that it is
    farther from the *float network* than the simulation is.
    """

    name: str
    """Of the runtime."""
    images: int
    snr_simulation: float
    """Of the logits, with the simulation as signal; 200 where they are equal."""
    snr_float: float
    """The same with the float network as signal."""
    largest: float
    """The largest difference of a logit from the simulation."""
    agrees_simulation: float
    """How often its top-1 is the simulation's."""
    agrees_float: float
    """How often its top-1 is the float network's."""
    top1: float | None
    """Accuracy; None for images without labels."""
    fault: str | None
    """What is wrong, as the end of a sentence; None where all is as it should be."""


def snr(signal: Array, found: Array) -> float:
    """``10 log10(|signal|^2 / |found - signal|^2)`` in decibels, at most 200; -200 where ``found`` has a NaN.

    >>> round(snr(np.array([3.0, 4.0]), np.array([3.0, 4.5])), 6)
    20.0
    """
    power, noise = (float(np.square(each, dtype=np.float64).sum()) for each in (signal, found - signal))
    if not math.isfinite(noise):
        return -_EQUAL
    return _EQUAL if noise == 0 else max(-_EQUAL, min(_EQUAL, 10 * math.log10(max(power, 1e-300) / noise)))


def distance(name: str, logits: Array, simulation: Array, exact: Array, labels: Labels | None = None) -> Distance:
    """How far ``logits`` (N, K) are from those of the ``simulation`` and of the ``exact`` float network.

    Its fault is found on the ``labels`` (N,), or without them on the top-1 of the float network.
    """
    best, simulated, true = (each.argmax(1) for each in (logits, simulation, exact))
    wanted = true if labels is None else labels
    return Distance(
        name=name,
        images=len(logits),
        snr_simulation=snr(simulation, logits),
        snr_float=snr(exact, logits),
        largest=float(np.abs(logits - simulation).max()),
        agrees_simulation=_share(best == simulated),
        agrees_float=_share(best == true),
        top1=None if labels is None else _share(best == labels),
        fault=_snr_fault(exact, simulation, logits) or _top1_fault(simulated == wanted, best == wanted),
    )


def _snr_fault(exact: Array, simulation: Array, file: Array) -> str | None:
    """A fault if the ``file`` is farther from ``exact``, by more than a decibel and two standard errors of the change.

    What lies 60 dB below the logits is not looked at: nothing that anyone could see is lost there.
    """
    before, after = (np.square(each - exact, dtype=np.float64).sum(1) for each in (simulation, file))
    floor = 1e-6 * float(np.square(exact, dtype=np.float64).sum(1).mean())
    change = after - before
    chance = 2 * float(change.std()) / math.sqrt(len(change))
    if change.mean() <= (10 ** (_SNR_LOSS / 10) - 1) * before.mean() + chance + floor:  # false for NaN
        return None
    return f"is {snr(exact, file):.1f} dB from the float network, the simulation {snr(exact, simulation):.1f} dB"


def _top1_fault(simulation: np.ndarray[Any, Any], file: np.ndarray[Any, Any]) -> str | None:
    """A fault if fewer images are right in the ``file``, by more than a point and two standard errors of the change."""
    lost, gained = int(np.sum(simulation & ~file)), int(np.sum(file & ~simulation))
    if lost - gained <= _TOP1_LOSS / 100 * len(file) + 2 * math.sqrt(lost + gained):
        return None
    return f"has the right top-1 on {_share(file):.2f} % of the images, the simulation on {_share(simulation):.2f} %"


def _share(hits: np.ndarray[Any, Any]) -> float:
    return 100 * float(np.mean(hits))
