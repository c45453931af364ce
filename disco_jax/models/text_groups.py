"""Computes short texts short, exactly.

CLIP pads every caption to `context_length`, but its text tower is causal and pooled at the end of
the text, so what follows the end changes nothing. Samples are ordered by length, processed in a
few groups of static size and length, e.g. half of them at 16 tokens, and put back in order. A batch
that does not fit its groups is processed at full length by the same program.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
# The length and the number of texts of each group, by increasing length.
Groups = Sequence[tuple[int, int]]
# (parameters, tokens in pieces `[b_i, n_i]`, keys `[b]` or None) -> features `[b, D]`
EncodeFn = Callable[[Any, Sequence[Array], Array | None], Array]

PIECES = 4  # in which texts that did not fit are differentiated, to take less memory


def lengths_of(tokens: Array) -> Array:
    """Returns int32 `[b]`: the tokens up to the end of each text, the highest ID."""
    return jnp.argmax(tokens, axis=-1).astype(jnp.int32) + 1


def fits(tokens: Array, groups: Groups) -> Array:
    """Whether texts `[b, n]`, ordered by length, fit their groups."""
    room = jnp.concatenate([jnp.full(count, length, jnp.int32) for length, count in groups])
    return jnp.all(jnp.sort(lengths_of(tokens)) <= room)


def too_long(tokens: Array, groups: Groups) -> Array:
    """Returns 1.0 if texts `[b, n]` don't fit their groups and are processed at full length."""
    return 1 - fits(tokens, groups).astype(jnp.float32)


def encode_in_groups(
    encode: EncodeFn, groups: Groups, params: Any, tokens: Array, keys: Array | None
) -> Array:
    """Returns `encode(params, (tokens,), keys)`, `[b, D]`, to rounding, for less work.

    Differentiable once, in reverse, with respect to `params`. If a batch does not fit, its groups'
    features are discarded, and it is encoded again at full length; the backward pass then
    recomputes it in pieces, so memory never exceeds that of the whole batch at full length.

    Args:
      encode: a causal tower pooled at the highest ID.
      groups: their counts add up to b.
      params: a pytree.
      tokens: int32 `[b, n]`.
      keys: random keys `[b]`, or None.
    """
    leaves, tree = jax.tree.flatten(params)

    def encode_leaves(leaves: list[Array], pieces: Sequence[Array], keys: Array | None) -> Array:
        return encode(jax.tree.unflatten(tree, leaves), pieces, keys)

    return _encode(encode_leaves, tuple(groups), leaves, jnp.asarray(tokens), keys)


# Its own derivative, because that of `lax.cond` would keep the intermediate results of both
# branches and copies of the parameters.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _encode(
    encode: EncodeFn, groups: Groups, leaves: list[Array], tokens: Array, keys: Array | None
) -> Array:
    grouped, whole = partial(_grouped, encode, groups), partial(_whole, encode)
    return lax.cond(fits(tokens, groups), grouped, whole, leaves, tokens, keys)


def _whole(encode: EncodeFn, leaves: list[Array], tokens: Array, keys: Array | None) -> Array:
    return encode(leaves, (tokens,), keys)


def _grouped(
    encode: EncodeFn, groups: Groups, leaves: list[Array], tokens: Array, keys: Array | None
) -> Array:
    order = jnp.argsort(lengths_of(tokens))
    parts = lax.split(tokens[order], [count for _, count in groups])
    pieces = [part[:, :n] for part, (n, _) in zip(parts, groups, strict=True)]
    features = encode(leaves, pieces, None if keys is None else keys[order])
    return features[jnp.argsort(order)]


def _forward(
    encode: EncodeFn, groups: Groups, leaves: list[Any], tokens: Any, keys: Any
) -> tuple[Array, Any]:
    # Frozen parameters, which are not perturbed, cost nothing in the backward pass.
    moving = [leaf.value if leaf.perturbed else None for leaf in leaves]
    fixed = [None if leaf.perturbed else leaf.value for leaf in leaves]
    tokens, keys = jax.tree.map(lambda x: x.value, (tokens, keys))

    def grouped(moving: list[Any]) -> Array:
        return _grouped(encode, groups, _merged(moving, fixed), tokens, keys)

    features, pull = jax.vjp(grouped, moving)
    fit = fits(tokens, groups)
    # Not in the branch: what `pull` keeps is then not copied out of it.
    features = lax.cond(
        fit, lambda: features, lambda: _whole(encode, _merged(moving, fixed), tokens, keys)
    )
    return features, (pull, moving, fixed, tokens, keys, fit)


def _backward(
    encode: EncodeFn, groups: Groups, saved: Any, d_features: Array
) -> tuple[list[Any], None, None]:
    pull, moving, fixed, tokens, keys, fit = saved

    def recomputed() -> list[Any]:
        def in_pieces(moving: list[Any]) -> Array:
            piece = jax.checkpoint(lambda x: _whole(encode, _merged(moving, fixed), *x))
            features = lax.map(piece, jax.tree.map(_fold, (tokens, keys)))
            return features.reshape(d_features.shape)

        return jax.vjp(in_pieces, moving)[1](d_features)[0]

    return lax.cond(fit, lambda: pull(d_features)[0], recomputed), None, None


_encode.defvjp(_forward, _backward, symbolic_zeros=True)


def _merged(moving: list[Any], fixed: list[Any]) -> list[Array]:
    return [b if a is None else a for a, b in zip(moving, fixed, strict=True)]


def _fold(x: Array) -> Array:
    """Reshapes `[b, ...]` to at least `PIECES` pieces, `[k, m, ...]`, as large as divide b."""
    size = max(m for m in range(1, max(1, len(x) // PIECES) + 1) if len(x) % m == 0)
    return x.reshape(-1, size, *x.shape[1:])
