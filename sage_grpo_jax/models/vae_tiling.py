"""Decoding on spatial tiles: bounded memory at any clip size, with linear blending at the seams.

Tiles cover all frames and a square of `tile` pixels; each starts (1 - overlap) of a tile after the
one before, and the shared strip fades from one to the other. Tiled and whole results differ: the
mid-block attention sees one tile only. The released weights are usually decoded this way.

Same numbers as `tiled_decode` of diffusers' video VAEs (overlap 0.25, the default there) and of
HunyuanVideo-1.5's own code (overlap 0.125): a tile is blended with the blended tile above it, then
with the blended one to its left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import AutoencoderConfig

Params = dict[str, Any]

TILE = 256
OVERLAPS = {"diffusers": 0.25, "official": 0.125}


class _Grid(NamedTuple):
    """Tiles of one axis, in the units of the input; `scale` maps them to those of the output."""

    size: int
    window: int
    stride: int
    scale: Callable[[int], int]

    def pieces(self) -> list[tuple[int, int]]:
        """(start, length) of each tile; the last ones may be shorter."""
        starts = range(0, self.size, self.stride)
        return [(start, min(self.window, self.size - start)) for start in starts]

    @property
    def kept(self) -> int:
        """What a tile gives to the output, unless it is shorter."""
        return self.scale(self.stride)

    @property
    def blended(self) -> int:
        """Width of the strip that two neighbours share, in the output."""
        return self.scale(self.window - self.stride)


@functools.partial(jax.jit, static_argnames=("config", "tile", "overlap"))
def decode_tiled(
    params: Params,
    latents_BxTxHxWxC: jax.Array,
    config: AutoencoderConfig,
    *,
    tile: int = TILE,
    overlap: float = OVERLAPS["diffusers"],
) -> jax.Array:
    """Like `decode` of the VAE, tile by tile; a clip that fits into one tile is decoded whole.

    Tiles of the same shape run one after the other in one compiled loop.

    Args:
      params: as from its `init_params`; only "decoder" is used.
      latents_BxTxHxWxC: unscaled latents.
      config: shape of the VAE.
      tile: side of a tile in pixels.
      overlap: part of a tile that it shares with the next, at most 0.5.

    Raises:
      ValueError: tile and overlap that do not come out as whole latents, wrong channels.
    """
    chex.assert_rank(latents_BxTxHxWxC, 5)
    model, ratio = registry.of(config), config.spatial_compression_ratio
    window, stride = _window_and_stride(ratio, tile, overlap)
    grids = [_Grid(n, window, stride, lambda x: x * ratio) for n in latents_BxTxHxWxC.shape[2:4]]

    # The barrier ties the weights to the tile: else XLA casts them once ahead of each loop, and
    # keeps the copies of all loops at the same time.
    def decode(latents: jax.Array) -> jax.Array:
        decoder, latents = lax.optimization_barrier((params["decoder"], latents))
        return model.decode_unclipped({"decoder": decoder}, latents, config)

    return model.clip_pixels(_tiled(decode, latents_BxTxHxWxC, grids))


def check_tile(config: AutoencoderConfig, tile: int, overlap: float) -> None:
    """Raises a ValueError unless the VAE can work on such tiles."""
    _window_and_stride(config.spatial_compression_ratio, tile, overlap)


def _window_and_stride(ratio: int, tile: int, overlap: float) -> tuple[int, int]:
    """Side of a tile and distance between two, in latents."""
    if tile < ratio or tile % ratio:
        raise ValueError(f"tile={tile}: must be a multiple of the VAE's {ratio} pixels a latent")
    window = tile // ratio
    shared = window * overlap
    if not 0 <= overlap <= 0.5 or shared != round(shared):
        raise ValueError(
            f"overlap={overlap}: must be 0 to 0.5 and make a whole number of the {window} latents "
            f"of a tile of {tile} pixels"
        )
    return window, window - round(shared)


def _tiled(
    function: Callable[[jax.Array], jax.Array], x_BxTxHxWxC: jax.Array, grids: list[_Grid]
) -> jax.Array:
    """`function` on every tile, blended and put together."""
    if all(grid.size <= grid.window for grid in grids):
        return function(x_BxTxHxWxC)
    rows, columns = grids
    tiles = _run(function, x_BxTxHxWxC, rows.pieces(), columns.pieces())
    lines, above = [], None
    for i in range(len(rows.pieces())):
        line = []
        for j in range(len(columns.pieces())):
            tile = tiles[i, j]
            if above is not None:
                tile = _blend(above[j], tile, rows.blended, axis=2)
            if line:
                tile = _blend(line[-1], tile, columns.blended, axis=3)
            line.append(tile)
        kept = [tile[:, :, : rows.kept, : columns.kept] for tile in line]
        lines.append(jnp.concatenate(kept, axis=3))
        above = line
    return jnp.concatenate(lines, axis=2)


def _run(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    rows: list[tuple[int, int]],
    columns: list[tuple[int, int]],
) -> dict[tuple[int, int], jax.Array]:
    """The output of each tile (row, column); one loop for all tiles of a shape."""
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, (_, height) in enumerate(rows):
        for j, (_, width) in enumerate(columns):
            by_shape.setdefault((height, width), []).append((i, j))
    done = {}
    for (height, width), places in by_shape.items():
        size = (*x.shape[:2], height, width, x.shape[4])
        corners = jnp.array([(rows[i][0], columns[j][0]) for i, j in places])

        def one(corner: jax.Array, size: tuple[int, ...] = size) -> jax.Array:
            return function(lax.dynamic_slice(x, (0, 0, corner[0], corner[1], 0), size))

        results = lax.map(one, corners)
        done |= {place: results[k] for k, place in enumerate(places)}
    return done


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """`after`, its first `extent` lines faded in from the last ones of `before`."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    if extent == 0:
        return after
    shape = [1] * after.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent, dtype=jnp.float32) / extent).reshape(shape)
    last = lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    first, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis=axis)
