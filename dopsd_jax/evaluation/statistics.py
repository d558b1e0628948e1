"""Means with 95 % intervals, where seeds within a prompt are not independent.

Prompts are the sample: pictures of one prompt are not independent, so their mean is one
observation. Intervals are Student's t over prompts; for a figure of a whole set of pictures, such
as FID, the jackknife that leaves out one prompt at a time. Two models drawn from the same noise are
compared by the differences within prompts, whose intervals are much smaller than those of the two
means.

An interval covers other prompts and other noise. It says nothing about training again with another
seed. Where all prompts agree its width is 0, but the value is not certain: a share of 0 or 1 of n
prompts is uncertain by about 3 / n.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Bool, Float

LEVEL = 0.95


class Estimate(NamedTuple):
    """value: the mean, or the figure of the whole set. half: half the width of the 95 % interval;
    None for a single prompt. prompts: independent observations."""

    value: float
    half: float | None
    prompts: int


def mean(values: Float[np.ndarray, "p s"]) -> Estimate:
    """The mean over p prompts of s pictures each.

    Examples:
      >>> found = mean(np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]))
      >>> found.value, float(round(found.half, 2)), found.prompts
      (2.5, 2.48, 3)
    """
    each = np.asarray(values, np.float64).mean(1)
    count = len(each)
    if count < 2:
        return Estimate(float(each.mean()), None, count)
    error = each.std(ddof=1) / math.sqrt(count)
    return Estimate(float(each.mean()), t_quantile(count - 1) * error, count)


def difference(values: Float[np.ndarray, "p s"], base: Float[np.ndarray, "p s"]) -> Estimate:
    """`values` less `base`, both of the same prompts and noise."""
    if np.shape(values) != np.shape(base):
        raise ValueError(f"values of shape {np.shape(values)}, base {np.shape(base)}: not paired")
    return mean(np.asarray(values, np.float64) - np.asarray(base, np.float64))


def jackknife(figure: Callable[[Bool[np.ndarray, " p"]], float], prompts: int) -> Estimate:
    """A figure of a whole set, with the interval from leaving out one prompt at a time.

    `figure` gets a mask of prompts to keep. It must be smooth in the set, as moments are; a median
    or a maximum is not. For the mean this is exactly `mean`.
    """
    whole = float(figure(np.ones(prompts, bool)))
    if prompts < 2:
        return Estimate(whole, None, prompts)
    less = np.array([figure(np.arange(prompts) != left_out) for left_out in range(prompts)])
    error = math.sqrt((prompts - 1) / prompts * np.square(less - less.mean()).sum())
    return Estimate(whole, t_quantile(prompts - 1) * error, prompts)


def t_quantile(freedom: int) -> float:
    """The t that |Student's t| of `freedom` degrees stays below with probability `LEVEL`."""
    return float(scipy.special.stdtrit(freedom, (1 + LEVEL) / 2))
