"""Chooses the groups in which texts are processed (`text_groups.py`) from their lengths."""

import itertools
import math
from statistics import NormalDist

import numpy as np

from disco_jax.config.text_groups import AUTO, parse_text_groups
from disco_jax.models.config import TextConfig
from disco_jax.models.text_groups import Groups

STEP = 8  # lengths are multiples of this, which suits matrix units and cuDNN's attention
MOST = 4  # groups that are shorter than the full length
# A group's room beyond the mean, in standard deviations. About one batch in a thousand is then too
# long for its groups, at the cost of two more forward passes of the tower.
DEVIATIONS = 3.5
WORTH = 0.01  # of the full cost, which a further group must save
MEDIAN, NINETY = 13, 29  # tokens of typical captions, including start and end


def typical_lengths(context: int, count: int = 2_048) -> np.ndarray:
    """Returns int `[count]`, ascending: the lengths of captions like those of web images.

    They follow a log-normal distribution with a median of 13 tokens, start and end included, and
    90 % of them below 30, cut at `context`.
    """
    normal = NormalDist(math.log(MEDIAN), math.log(NINETY / MEDIAN) / NormalDist().inv_cdf(0.9))
    logs = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    return np.clip(np.exp(logs).round().astype(int), 2, context)


def choose_text_groups(lengths: np.ndarray, count: int, context: int) -> str:
    """Returns the cheapest groups for batches of `count` texts, as `model.text_groups`.

    Args:
      lengths: int `[n]`, the tokens of a sample of texts, start and end included; may be empty.
      count: texts that a device processes at once.
      context: the full length.

    Returns:
      e.g. `16:0.5,32:0.9`, or "" if groups would not pay off.
    """
    if not len(lengths):
        return ""
    room = {0: count} | {n: _room(lengths, count, n) for n in range(STEP, context, STEP)}

    def cost(chosen: tuple[int, ...]) -> float:
        edges = [0, *chosen, context]
        room_beyond = [*(room[n] for n in edges[:-1]), 0]
        tokens = sum(n * (room_beyond[i] - room_beyond[i + 1]) for i, n in enumerate(edges[1:]))
        return tokens + WORTH * len(chosen) * count * context

    options = itertools.chain.from_iterable(
        itertools.combinations([n for n in room if n], k) for k in range(MOST + 1)
    )
    best = min(options, key=cost)
    shares = {n: f"{math.floor(1e4 * (1 - room[n] / count)) / 1e4:g}" for n in best}
    return ",".join(f"{n}:{share}" for n, share in shares.items())


def _room(lengths: np.ndarray, count: int, length: int) -> int:
    """Returns how many of `count` texts must be allowed to be longer than `length`."""
    n = len(lengths)
    share = (np.count_nonzero(lengths > length) + 1) / (n + 2)
    deviation = math.sqrt(count * share * (1 - share) * (1 + count / n))  # n is finite as well
    return min(count, math.ceil(count * share + DEVIATIONS * deviation))


def groups_of(setting: str, count: int, text: TextConfig) -> Groups:
    """Returns the groups of `count` texts; empty if all of them are processed at full length.

    Args:
      setting: `model.text_groups`; `auto` stands for the groups of `typical_lengths`.
      count: texts that a device processes at once.
      text: the tower. SigLIP's attends to the padding, so it has no groups.
    """
    context = text.context_length
    if text.pool != "argmax":
        return ()
    if setting == AUTO:
        setting = choose_text_groups(typical_lengths(context), count, context)
    # Rounding down moves texts to longer groups, where they fit as well.
    pairs = [(n, int(share * count + 1e-6)) for n, share in parse_text_groups(setting)]
    until = [0, *(upto for _, upto in pairs), count]
    lengths = [*(n for n, _ in pairs), context]
    sizes = [(n, b - a) for n, a, b in zip(lengths, until, until[1:], strict=False) if b > a]
    return () if sizes == [(context, count)] else tuple(sizes)
