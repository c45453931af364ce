"""The pre-norm transformer block that both towers share, and stacks of it.

Blocks operate on flattened tokens `[b*n, width]` and use the shape `[b, n, heads, head_dim]` only
for attention. Weight gradients are then plain matrix products, which XLA's CPU backend runs twice
as fast as contractions of two dimensions. On other backends this costs nothing. It also lets one
stack process samples of several lengths at once (`Piece`), with the weights read only once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer, normal, variance_scaling, xavier_uniform, zeros

from disco_jax.models.attention import attend, padding_for, project
from disco_jax.models.config import CLIPConfig, TowerConfig
from disco_jax.models.remat import BLOCK_INPUT, HIDDEN, rematerialize

Array = jax.Array


class Piece(NamedTuple):
    """A range of flattened rows: the tokens of some samples, one sample after the other."""

    samples: int
    tokens: int  # per sample, including padding
    padding: int = 0  # tokens at the end of each sample that no other token attends to

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.samples * self.tokens


@dataclass(frozen=True)
class BlockInit:
    """Initializers of one block: the four kernels and the biases of the two MLP layers."""

    in_proj: Initializer
    out_proj: Initializer
    mlp_in: Initializer
    mlp_out: Initializer
    mlp_in_bias: Initializer
    mlp_out_bias: Initializer


def clip_text_init(width: int, mlp_width: int, layers: int) -> BlockInit:
    """CLIP's text tower: residual branches start smaller in deeper towers.

    OpenAI's `initialize_parameters` (OpenAI CLIP, `model.py`) leaves MLP biases at PyTorch's
    default.
    """
    attention, residual = width**-0.5, (width * 2 * layers) ** -0.5
    return BlockInit(
        in_proj=normal(attention),
        out_proj=normal(residual),
        mlp_in=normal((2 * width) ** -0.5),
        mlp_out=normal(residual),
        mlp_in_bias=_symmetric_uniform(width**-0.5),
        mlp_out_bias=_symmetric_uniform(mlp_width**-0.5),
    )


def clip_vision_init(width: int, mlp_width: int) -> BlockInit:
    """CLIP's image tower: PyTorch's defaults, which OpenAI's code leaves unchanged.

    The attention input is Xavier-uniform; linear layers are uniform in ±1/sqrt(fan_in), biases too.
    """
    linear = variance_scaling(1 / 3, "fan_in", "uniform")
    return BlockInit(
        in_proj=variance_scaling(1.0, "fan_avg", "uniform"),
        out_proj=linear,
        mlp_in=linear,
        mlp_out=linear,
        mlp_in_bias=_symmetric_uniform(width**-0.5),
        mlp_out_bias=_symmetric_uniform(mlp_width**-0.5),
    )


def siglip_init() -> BlockInit:
    """SigLIP's blocks in both towers: Xavier-uniform, tiny biases (big_vision, `models/vit.py`)."""
    kernel, bias = xavier_uniform(), normal(1e-6)
    return BlockInit(kernel, kernel, kernel, kernel, mlp_in_bias=bias, mlp_out_bias=bias)


def _symmetric_uniform(bound: float) -> Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding  # the state is sharded by jit's out_shardings
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation of GELU, `x * sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU, `x Φ(x)`, computed with erf.

    The custom backward pass saves only `x`; differentiating the formula would also save the output
    of erf. `jax.nn.gelu` uses erfc, which is several times slower on CPUs.
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: Array) -> Array:
    return (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return (g * (_normal_cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def gelu_tanh(x: Array) -> Array:
    """GELU approximated with tanh: Flax's default, and therefore SigLIP's."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
}


class LayerNorm(nnx.LayerNorm):
    """LayerNorm in fp32, including gain and bias, that returns the dtype of its input.

    With a 16-bit `dtype`, Flax's LayerNorm would round gain and bias before using them: a gain of
    1.0019 would become 1 in bf16.
    """

    def __init__(self, tower: TowerConfig, *, rngs: nnx.Rngs):
        super().__init__(tower.width, epsilon=tower.norm_eps, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps `[..., width]` to the same shape and dtype."""
        return super().__call__(x).astype(x.dtype)


class Block(nnx.Module):
    """`x + attention(ln_1(x))`, then `x + mlp(ln_2(x))`, on flattened tokens `[rows, width]`."""

    def __init__(
        self,
        tower: TowerConfig,
        config: CLIPConfig,
        *,
        causal: bool,
        init: BlockInit,
        rngs: nnx.Rngs,
    ):
        width, dtype = tower.width, jnp.dtype(config.dtype)
        if width % tower.heads:
            raise ValueError(f"width {width} must be a multiple of the {tower.heads} heads")
        self.heads, self.causal = tower.heads, causal
        self.activation = ACTIVATIONS[tower.activation]
        self.dropout, self.attention = tower.dropout, config.attention

        def linear(n_in: int, n_out: int, kernel: Initializer, bias: Initializer) -> nnx.Linear:
            return nnx.Linear(
                n_in, n_out, kernel_init=kernel, bias_init=bias, dtype=dtype, rngs=rngs
            )

        self.ln_1 = LayerNorm(tower, rngs=rngs)
        self.in_proj = linear(width, 3 * width, init.in_proj, zeros)
        self.out_proj = linear(width, width, init.out_proj, zeros)
        self.ln_2 = LayerNorm(tower, rngs=rngs)
        self.mlp_in = linear(width, tower.mlp_width, init.mlp_in, init.mlp_in_bias)
        self.mlp_out = linear(tower.mlp_width, width, init.mlp_out, init.mlp_out_bias)

    def __call__(self, x: Array, pieces: Sequence[Piece], keys: Array | None) -> Array:
        """Maps `[rows, width]` to the same shape. `keys`, one per sample, enable dropout."""
        x = x + self._drop(self._attention(self.ln_1(x), pieces), pieces, keys, 1)
        hidden = checkpoint_name(self.mlp_in(self.ln_2(x)), HIDDEN)
        mixed = self.mlp_out(self.activation(hidden))
        return x + self._drop(mixed, pieces, keys, 2)

    def _drop(self, branch: Array, pieces: Sequence[Piece], keys: Array | None, use: int) -> Array:
        """Applies dropout to `[rows, width]`, scaling what remains to preserve the mean."""
        if keys is None or not self.dropout:
            return branch
        keep, width = 1 - self.dropout, branch.shape[1]

        def drawn(keys: Array, tokens: int) -> Array:
            # JAX's default generator numbers its draws by row, so a sample's first tokens draw the
            # same, however many follow.
            draw = jax.vmap(
                lambda k: jax.random.bernoulli(jax.random.fold_in(k, use), keep, (tokens, width))
            )
            return draw(keys).reshape(-1, width)

        parts = jax.lax.split(keys, [piece.samples for piece in pieces])
        kept = jnp.concatenate(
            [drawn(part, piece.tokens) for part, piece in zip(parts, pieces, strict=True)]
        )
        return jnp.where(kept, branch / keep, 0).astype(branch.dtype)

    def _attention(self, x: Array, pieces: Sequence[Piece]) -> Array:
        kernel, bias = (p[...].astype(x.dtype) for p in (self.in_proj.kernel, self.in_proj.bias))
        rows = [piece.rows for piece in pieces]
        qkv = (jax.lax.split(y, rows) for y in project(x, kernel, bias, self.attention))
        mixed = [
            attend(
                *of_piece,
                tokens=piece.tokens,
                padding=piece.padding,
                heads=self.heads,
                causal=self.causal,
                attention=self.attention,
            )
            for piece, *of_piece in zip(pieces, *qkv, strict=True)
        ]
        return self.out_proj(jnp.concatenate(mixed))


class Transformer(nnx.Module):
    """A stack of `layers` identical blocks, stored as one with leading axis `[layers]`.

    It runs under `lax.scan`, so a block is compiled only once, however deep the tower.
    """

    def __init__(
        self,
        tower: TowerConfig,
        config: CLIPConfig,
        *,
        causal: bool,
        init: BlockInit,
        rngs: nnx.Rngs,
    ):
        trained, layers = tower.trained_blocks, tower.layers
        if trained > layers:
            raise ValueError(f"trained_blocks is {trained}; it must be at most {layers}, the depth")
        self.remat, self.remat_blocks = tower.remat, tower.remat_blocks or layers
        self.layers, self.frozen = layers, layers - trained if trained > 0 else 0
        self.unroll = config.unroll
        self.attention = config.attention

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(tower, config, causal=causal, init=init, rngs=rngs)

        self.blocks = stack(rngs)

    def __call__(self, x: Array, keys: Array | None = None) -> Array:
        """Maps `[b, n, width]` to the same shape; `keys` `[b]` enable dropout."""
        b, n, width = x.shape
        return self.flat(x.reshape(b * n, width), [(b, n)], keys).reshape(b, n, width)

    def flat(self, x: Array, shapes: Sequence[tuple[int, int]], keys: Array | None = None) -> Array:
        """Maps flattened tokens `[rows, width]` to the same shape.

        Args:
          x: the tokens of all samples, in order.
          shapes: the samples and the tokens per sample of consecutive ranges of rows, `(b, n)`.
          keys: one per sample; they enable dropout.
        """
        added = [padding_for(n, self.attention) for _, n in shapes]
        pieces = [Piece(b, n + p, p) for (b, n), p in zip(shapes, added, strict=True)]
        padded = [(piece.samples, piece.tokens) for piece in pieces]
        x = _resize(x, shapes, padded)
        graph, stacked = nnx.split(self.blocks)

        def layer(x: Array, block: tuple[nnx.State, Array]) -> tuple[Array, None]:
            params, index = block
            own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            return nnx.merge(graph, params)(checkpoint_name(x, BLOCK_INPUT), pieces, own), None

        blocks = (stacked, jnp.arange(1, self.layers + 1, dtype=jnp.int32))
        for first, end, remat in self._stretches():
            part = jax.tree.map(lambda a, first=first, end=end: a[first:end], blocks)
            if end <= self.frozen:  # in a scan of their own, which is not differentiated
                part = jax.lax.stop_gradient(part)
            x, _ = jax.lax.scan(rematerialize(layer, remat), x, part, unroll=self.unroll)
        return _resize(x, padded, shapes)

    def _stretches(self) -> list[tuple[int, int, str]]:
        """Returns the first block, the end and the rematerialization of consecutive blocks."""
        partly = max(self.frozen, self.layers - self.remat_blocks)
        stretches = [
            (0, self.frozen, "none"),
            (self.frozen, partly, "full"),
            (partly, self.layers, self.remat),
        ]
        return [stretch for stretch in stretches if stretch[0] < stretch[1]]


def _resize(x: Array, shapes: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> Array:
    """Cuts or zero-pads every sample in flattened tokens `[rows, width]` at its end."""
    if list(shapes) == list(new):
        return x
    width = x.shape[1]
    parts = jax.lax.split(x, [b * n for b, n in shapes])
    resized = [
        jax.lax.pad(
            part.reshape(b, n, width), jnp.zeros((), x.dtype), ((0, 0, 0), (0, m - n, 0), (0, 0, 0))
        )
        for part, (b, n), (_, m) in zip(parts, shapes, new, strict=True)
    ]
    return jnp.concatenate([part.reshape(-1, width) for part in resized])
