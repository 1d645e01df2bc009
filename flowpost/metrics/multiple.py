r"""Several p-values at once: Holm's correction, and the largest statistic of common permutations.

Of K statistics, all computed on the same B + 1 labellings of the events, that of the data first,
and :math:`Z_{bk}` the same less its mean over the labellings, in units of its standard deviation,

.. math:: p_k = \frac{\#\{b : T_{bk} \ge T_{0k}\}}{1 + B}, \qquad
          \tilde p_k = \frac{\#\{b : \max_j Z_{bj} \ge Z_{0k}\}}{1 + B}

are the p-values of each alone and those corrected for there being K. The data are one of the
labellings in mean and deviation too, so that the smallest corrected one is at most α with
probability at most α, exactly, whatever the correlations of the statistics. Holm's correction needs
no common permutations, and makes no use of correlations either.

References:
    Resampling-Based Multiple Testing (P. Westfall, S. Young, 1993), section 2.3

    A Simple Sequentially Rejective Multiple Test Procedure (S. Holm, 1979)
    https://www.jstor.org/stable/4615733
"""

from __future__ import annotations

import numpy as np

__all__ = ["holm", "largest_statistic"]

# statistics that are equal in exact arithmetic differ by rounding
_DIGITS = 9


def holm(p: np.ndarray) -> np.ndarray:
    """Return p-values (K,) corrected by Holm's method, in the order given."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def largest_statistic(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the p-values (K,) of each statistic alone, and those corrected for their number.

    Arguments:
        values: Statistics (1 + B, K), large where the samples differ; of the data in row 0. One
            that is not finite counts as the largest.
    """
    known = np.isfinite(values)
    finite = np.where(known, values, 0.0)
    scale = np.maximum(np.abs(finite).max(0), np.finfo(float).tiny)
    finite = np.round(finite / scale, _DIGITS)
    count = np.maximum(known.sum(0), 1)
    centred = np.where(known, finite - finite.sum(0) / count, 0.0)
    spread = np.sqrt(np.square(centred).sum(0) / count)
    # one that is the same for all labellings says nothing
    varies = spread > 10.0**-_DIGITS
    units = np.where(varies, centred / np.where(varies, spread, 1.0), -np.inf)
    units = np.where(known, np.round(units, _DIGITS), np.inf)
    own = (np.where(known, finite, np.inf) >= np.where(known[0], finite[0], np.inf)).sum(0)
    largest = (units.max(1)[:, None] >= units[0]).sum(0)
    return own / len(values), largest / len(values)
