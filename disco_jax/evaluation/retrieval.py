"""Image-text retrieval in both directions, in tiles: the matrix of all pairs is never formed."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from disco_jax.mesh import batch_sharding, place_rows, replicated

QUERIES, CANDIDATES = 1024, 4096  # per tile


def recall_at(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, ks: tuple[int, ...], mesh: Mesh
) -> dict[str, float]:
    """Returns `image_to_text_recall@k` and `text_to_image_recall@k`.

    An image is found if any of its captions ranks in the top k, and a caption if its image does.

    Args:
      images: fp32 `[n, D]` unit rows, on every process.
      texts: fp32 `[m, D]` unit rows.
      owner: int `[m]`, the index of each caption's image.
      ks: the values of k.
      mesh: the mesh that queries are sharded over.
    """
    numbers = np.arange(len(images))
    ranks = {
        "image_to_text": rank(images, numbers, texts, owner, mesh),
        "text_to_image": rank(texts, owner, images, numbers, mesh),
    }
    return {
        f"{way}_recall@{k}": float(np.mean(found < k)) for way, found in ranks.items() for k in ks
    }


def rank(
    queries: np.ndarray,
    query_ids: np.ndarray,
    candidates: np.ndarray,
    candidate_ids: np.ndarray,
    mesh: Mesh,
) -> np.ndarray:
    """Returns int `[q]`, how many candidates rank before the best candidate with a query's own id.

    Ties count as ranking before, so features that don't tell candidates apart are not rewarded. For
    a query without candidates of its own, all other candidates rank before.
    """
    compute = _jitted(mesh)
    width = min(CANDIDATES, len(candidates))
    count = -(-len(candidates) // width)
    padded = _padded(candidates, count * width, 0).reshape(count, width, -1)
    # Padding rows have an id that no query has, and are never counted.
    ids = _padded(candidate_ids.astype(np.int32), count * width, -1).reshape(count, width)
    whole = replicated(mesh)
    tiles = [jax.make_array_from_process_local_data(whole, x) for x in (padded, ids)]
    size = -(-min(QUERIES, len(queries)) // mesh.devices.size) * mesh.devices.size
    found = []
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        rows = (
            place_rows(_padded(queries[part], size, 0), mesh),
            place_rows(_padded(query_ids[part].astype(np.int32), size, -2), mesh),
        )
        found.append(np.asarray(compute(rows, *tiles)))
    return np.concatenate(found)[: len(queries)]


def _ranks(rows: tuple[jax.Array, jax.Array], candidates: jax.Array, ids: jax.Array) -> jax.Array:
    queries, query_ids = rows

    def scores(tile: jax.Array) -> jax.Array:
        # Both passes compute the same product, so own scores and their rivals are rounded alike.
        return jnp.matmul(queries, tile.T, precision="highest")

    def best(own: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        mine = query_ids[:, None] == tile[1][None, :]
        return jnp.maximum(own, jnp.where(mine, scores(tile[0]), -jnp.inf).max(axis=1)), None

    def before(rank: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        theirs = (query_ids[:, None] != tile[1][None, :]) & (tile[1] >= 0)[None, :]
        # A NaN also counts as ranking before, so a broken model finds nothing.
        ahead = theirs & ~(scores(tile[0]) < own[:, None])
        return rank + ahead.sum(axis=1, dtype=jnp.int32), None

    own, _ = lax.scan(best, jnp.full(len(queries), -jnp.inf), (candidates, ids))
    ranks, _ = lax.scan(before, jnp.zeros(len(queries), jnp.int32), (candidates, ids))
    return ranks


@cache
def _jitted(mesh: Mesh) -> Callable[..., jax.Array]:
    return jax.jit(
        _ranks,
        in_shardings=(batch_sharding(mesh), replicated(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def _padded(rows: np.ndarray, length: int, filler: float) -> np.ndarray:
    out = np.full((length, *rows.shape[1:]), filler, rows.dtype)
    out[: len(rows)] = rows
    return out
