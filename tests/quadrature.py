"""Grids of labels on which tests integrate densities."""

import numpy as np

from flowpost import Interval, Positive


def grid(space, draws, n):
    """Points of one label column around its draws, even in z or ln z, without our charts."""
    low, high = draws.min().item(), draws.max().item()
    if isinstance(space, Positive):
        return np.geomspace(low * (low / high) ** 0.3, high * (high / low) ** 0.3, n)
    low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
    if isinstance(space, Interval):
        low, high = max(low, space.low[0] + 1e-9), min(high, space.high[0] - 1e-9)
    return np.linspace(low, high, n)
