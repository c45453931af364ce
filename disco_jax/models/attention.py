"""Multi-head self-attention, between its input and output projections."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from disco_jax.models.config import Attention
from disco_jax.models.remat import ATTENDED

Array = jax.Array

SCOPE = "attention"  # in the names of its operations, for profiles and the planner
# JAX can't differentiate cuDNN's attention for an odd number of tokens, such as CLIP's 77 for texts
# and 197 or 257 for images, so samples are padded to a multiple.
TOKEN_MULTIPLE: dict[Attention, int] = {"cudnn": 2, "xla": 1}


def padding_for(tokens: int, attention: Attention) -> int:
    """Returns the number of tokens to add to each sample."""
    return -tokens % TOKEN_MULTIPLE[attention]


def project(x: Array, kernel: Array, bias: Array, attention: Attention) -> tuple[Array, ...]:
    """Projects `[rows, width]` to queries, keys and values, each `[rows, width]`.

    Args:
      x: `[rows, width]`.
      kernel: `[width, 3*width]`: the kernels of queries, keys and values, side by side.
      bias: `[3*width]`.
      attention: cuDNN takes queries, keys and values in three arrays, so there are three matmuls:
        splitting the output of one would copy them. XLA's attention needs no such copies, and one
        matmul is faster on CPUs.
    """
    if attention == "cudnn":
        parts = zip(jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        return tuple(x @ k + b[None] for k, b in parts)
    return tuple(jnp.split(x @ kernel + bias[None], 3, axis=1))


@jax.named_scope(SCOPE)
def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    tokens: int,
    padding: int,
    heads: int,
    causal: bool,
    attention: Attention,
) -> Array:
    """Mixes the values of each sample by the softmax of its queries' products with its keys.

    Args:
      q: Queries, `[b*tokens, width]`, as are the keys `k` and the values `v`.
      k: Keys.
      v: Values.
      tokens: Tokens per sample, including padding.
      padding: How many of them, at the end, are padding. No other token attends to them.
      heads: Number of heads; divides the width.
      causal: Whether a token attends only to itself and earlier ones.
      attention: Implementation, `cudnn` (flash attention, 16-bit) or `xla`.

    Returns:
      `[b*tokens, width]`. Padding tokens hold finite numbers of no meaning.
    """
    width = q.shape[-1]
    q, k, v = (x.reshape(-1, tokens, heads, width // heads) for x in (q, k, v))
    lengths = None
    if padding and not causal:  # a causal mask hides the padding already
        lengths = jnp.full(len(q), tokens - padding, jnp.int32)
        k, v = (_without_gradient_at_end(padding, x) for x in (k, v))
    mixed = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=attention
    )
    mixed = mixed.reshape(-1, width)
    # The outputs of cuDNN's attention are saved as a whole (remat.py).
    return mixed if attention == "cudnn" else checkpoint_name(mixed, ATTENDED)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _without_gradient_at_end(count: int, x: Array) -> Array:
    """Identity on `[b, n, ...]`, with a zero gradient for the last `count` of the n tokens.

    cuDNN does not promise to write the gradients of keys and values beyond their lengths.
    """
    del count
    return x


def _identity_forward(count: int, x: Array) -> tuple[Array, None]:
    del count
    return x, None


def _identity_backward(count: int, _: None, g: Array) -> tuple[Array]:
    return (g.at[:, -count:].set(0),)


_without_gradient_at_end.defvjp(_identity_forward, _identity_backward)
