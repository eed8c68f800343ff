"""Rotary positions: the angles of all variants in use, and the rotation of queries and keys by them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from jaxrl_post.types import Array

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class Rope:
    r"""How positions become angles, $\theta_i = p\, f_i$ with $f_i = b^{-2i/R}$ before scaling.

    The kinds are those of Hugging Face configurations, with their names:

    - `linear`: all frequencies divided by `factor` (Position Interpolation, arXiv 2306.15595).
    - `dynamic`: a larger base for rows longer than `original_length` (NTK-aware, dynamic).
    - `llama3`: long wavelengths divided by `factor`, short ones kept, a ramp between (The Llama 3 Herd of Models,
      arXiv 2407.21783).
    - `yarn`: the ramp over dimensions, and cosines and sines times an attention factor (YaRN, arXiv 2309.00071).
    - `longrope`: a divisor for each frequency, another one for rows longer than `original_length` (LongRoPE, arXiv
      2402.13753).

    Attributes:
        base: $b$.
        kind: see above.
        fraction: share of a head's dimensions that is rotated, from the first on; the others are left as they are.
        factor: how many times longer than `original_length` sequences may be.
        original_length: tokens of the context that the model was trained with before it was extended.
        low_freq_factor: `llama3`: wavelengths above `original_length / low_freq_factor` are scaled in full.
        high_freq_factor: `llama3`: wavelengths below `original_length / high_freq_factor` are not scaled.
        beta_fast: `yarn`: dimensions that turn more often than this in `original_length` are not scaled.
        beta_slow: `yarn`: dimensions that turn less often are scaled in full.
        attention_factor: `yarn`, `longrope`: of cosines and sines; None for the one that follows from `factor`.
        mscale: `yarn`: with `mscale_all_dim`, the attention factor is the ratio of two logarithmic factors.
        mscale_all_dim: see `mscale`.
        truncate: `yarn`: whether the ramp begins and ends at whole dimensions.
        short_factor: `longrope`: divisors of the frequencies of rows up to `original_length`.
        long_factor: `longrope`: of longer rows.
    """

    base: float = 10000.0
    kind: RopeKind = "default"
    fraction: float = 1.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def rotated(self, head_dim: int) -> int:
        """`R`: how many dimensions of a head are rotated.

        Raises:
            ValueError: if that is not an even number between 2 and `head_dim`.
        """
        rotated = int(head_dim * self.fraction)
        if rotated < 2 or rotated % 2 or rotated > head_dim:
            raise ValueError(f"rope fraction {self.fraction} of head_dim {head_dim} must be an even number above 0")
        return rotated

    def check(self, head_dim: int) -> None:
        """Raise ValueError for an unknown kind, or one whose settings are missing."""
        rotated = self.rotated(head_dim)
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"rope kind must be one of {', '.join(get_args(RopeKind))}, got {self.kind!r}")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and self.original_length < 1:
            raise ValueError(f"rope {self.kind} needs original_length, the context before it was extended")
        if self.kind == "longrope" and not len(self.short_factor) == len(self.long_factor) == rotated // 2:
            raise ValueError(
                f"rope longrope needs short_factor and long_factor of {rotated // 2} numbers, half the rotated "
                f"dimensions, got {len(self.short_factor)} and {len(self.long_factor)}"
            )


def rotary_angles(rope: Rope, head_dim: int, positions: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Cosines and sines, each `[B, T, R/2]`, times the attention factor where there is one.

    The kinds `dynamic` and `longrope` look at the longest position of each row that is computed together: a row that
    grows beyond `original_length` while it is decoded keeps the keys that it has.

    Args:
        rope: the variant.
        head_dim: size of a head.
        positions: `[B, T]` int.
        dtype: float32 or wider, of the result.

    Returns:
        `(cos, sin)`.

    Example:
        >>> cos, sin = rotary_angles(Rope(base=100.0), 4, jnp.array([[0, 1]]), jnp.dtype("float32"))
        >>> [round(float(x), 4) for x in cos[0, 1]], [round(float(x), 4) for x in sin[0, 1]]
        ([0.5403, 0.995], [0.8415, 0.0998])
    """
    rotated = rope.rotated(head_dim)
    length = jnp.max(positions, axis=1, keepdims=True) + 1  # [B, 1]
    if rope.kind == "dynamic":
        longest = jnp.maximum(length, rope.original_length).astype(dtype)
        stretch = rope.factor * longest / rope.original_length - (rope.factor - 1)
        base = rope.base * stretch ** (rotated / (rotated - 2))
        frequency = 1.0 / base ** (jnp.arange(0, rotated, 2, dtype=dtype) / rotated)
    elif rope.kind == "longrope":
        plain = _plain(rope, rotated)
        short, long = (jnp.asarray(plain / np.asarray(f), dtype) for f in (rope.short_factor, rope.long_factor))
        frequency = jnp.where(length > rope.original_length, long, short)
    else:
        frequency = jnp.asarray(_frequencies(rope, rotated), dtype)[None]
    angle = positions[..., None].astype(dtype) * frequency[:, None]
    factor = _attention_factor(rope)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotate `[B, T, H, K]` queries or keys: dimension `i` together with `i + R/2`; those from `R` on stay.

    Reference: RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864.
    """
    cos, sin = (r[:, :, None, :] for r in rotation)
    half = cos.shape[-1]
    wide = x.astype(cos.dtype)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x.dtype)


def _plain(rope: Rope, rotated: int) -> np.ndarray:
    # In float32, as the models were trained with; only a base beyond its range is left to float64.
    return (1.0 / np.float32(rope.base) ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated)).astype(np.float32)


def _frequencies(rope: Rope, rotated: int) -> np.ndarray:
    """`[R/2]`: the frequencies of the kinds that do not look at the row."""
    frequency = _plain(rope, rotated)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        low, high = rope.original_length / rope.low_freq_factor, rope.original_length / rope.high_freq_factor
        ramp = (rope.original_length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        between = (1 - ramp) * frequency / rope.factor + ramp * frequency
        return np.where(wavelength > low, frequency / rope.factor, np.where(wavelength < high, frequency, between))
    if rope.kind == "yarn":

        def dimension(turns: float) -> float:
            return rotated * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        high = high + 0.001 if low == high else high
        scaled = np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        return frequency / rope.factor * scaled + frequency * (1 - scaled)
    return frequency


def _attention_factor(rope: Rope) -> float:
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length)) if rope.factor > 1 else 1.0

    def logarithmic(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return logarithmic(rope.mscale) / logarithmic(rope.mscale_all_dim)
    return logarithmic(1.0)
