"""Retrieval of images by caption and captions by image."""

import numpy as np


def recall_at(queries: np.ndarray, candidates: np.ndarray, ks: tuple[int, ...]) -> dict[int, float]:
    """The share of queries whose own candidate, that of the same row, is among the first k.

    A candidate that scores the same as a query's own counts as ranked before it: features that do
    not tell captions apart are not rewarded for it.

    Args:
      queries: `[n, D]` unit rows.
      candidates: `[n, D]` unit rows.
      ks: the ks.
    """
    scores = queries @ candidates.T
    own = np.diagonal(scores)[:, None]
    others = ~np.eye(len(scores), dtype=bool)
    ranks = np.sum((scores >= own) & others, axis=1)
    return {k: float(np.mean(ranks < k)) for k in ks}
