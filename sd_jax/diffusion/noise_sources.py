"""The noise of other programs: so that a seed of A1111, ComfyUI or diffusers gives the same picture here.

Two generators, in numpy:

    torch_cpu   Mersenne Twister MT19937 (Matsumoto & Nishimura 1998) as torch seeds and reads it on the CPU: A1111 with
                "RNG: CPU", ComfyUI and diffusers with a CPU generator. Only the low 32 bits of a seed count.
    nv          Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") as CUDA's torch.randn
                reads it: A1111 with "RNG: NV", and with "RNG: GPU" on an NVIDIA card that has a thread for every
                number of the latents (1536 or 2048 for each multiprocessor; otherwise threads make several each).

Both make a normal number from uniform ones by Box & Muller 1958,

    n1 = sqrt(-2 log u1) cos(2 pi u2),    n2 = sqrt(-2 log u1) sin(2 pi u2)                                 (1)

The integers are equal to the bit; the normal numbers differ by a few units in the last place, by the logarithm and the
sine of the other program (measured: 5e-7 from torch 2.13). Layout: torch's NCHW, except for what `webui_noise` returns.

A1111 draws from one generator for each picture: first the starting noise, then one draw whenever the sampler asks for
noise. Its "eta noise seed delta" (ENSD) gives the second part a generator of its own, seeded seed + delta.
"""

import math

import numpy as np
from jaxtyping import Float, UInt32

_FLOAT32 = np.float32


class NoiseSource:
    """A generator, from which each `draw` takes the next numbers. Raises ValueError for an unknown source."""

    def __init__(self, source: str, seed: int):  # source: a key of SOURCES; seed: modulo 2^64
        if source not in SOURCES:
            raise ValueError(f"unknown noise source {source!r}: choose one of {', '.join(SOURCES)}")
        self._generator = SOURCES[source](seed % 2**64)

    def draw(self, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Standard normal numbers, float32: what the next torch.randn(shape) of that generator gives."""
        return self._generator.normal(math.prod(shape)).reshape(shape)


def draw(source: str, seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The first draw of a new generator. ComfyUI's starting noise is draw("torch_cpu", seed, [batch, c, h, w])."""
    return NoiseSource(source, seed).draw(shape)


def webui_noise(
    source: str,  # a key of SOURCES
    seed: int,  # of this picture: A1111 adds the picture's number in its batch, to `subseed` if there is a strength
    shape: tuple[int, int, int],  # of its latents, [h, w, c]
    num_draws: int,  # for the sampler
    ensd: int = 0,  # eta noise seed delta
    subseed: int = 0,
    subseed_strength: float = 0.0,  # 0 = the seed's noise alone, 1 = the subseed's
    resize_from: tuple[int, int] | None = None,  # [h, w] of latents for which the seed was; None = the same
) -> tuple[Float[np.ndarray, "h w c"], Float[np.ndarray, "draws h w c"]]:
    """(starting noise, the sampler's draws in order) of one picture as A1111 makes them, NHWC, float32.

    The samplers that A1111 gives a Brownian tree (the SDE ones) take other noise than these draws.
    """
    h, w, c = shape
    generator = NoiseSource(source, seed)
    first = generator.draw((c, h, w))  # also when it is replaced: the generator has moved on
    start, size = first, (c, *(resize_from or (h, w)))
    if size != first.shape:
        start = draw(source, seed, size)
    if subseed_strength != 0:
        start = slerp(start, draw(source, subseed, size), subseed_strength)
    if size != first.shape:
        start = centred(start, first)
    if ensd:
        generator = NoiseSource(source, seed + ensd)
    draws = [generator.draw((c, h, w)) for _ in range(num_draws)]
    draws = np.stack(draws) if draws else np.zeros((0, c, h, w), np.float32)
    return start.transpose(1, 2, 0), draws.transpose(0, 2, 3, 1)


def slerp(
    low: Float[np.ndarray, "c h w"],
    high: Float[np.ndarray, "c h w"],
    t: float,  # 0 = low, 1 = high
) -> Float[np.ndarray, "c h w"]:
    """Between two noises along the great circle, as A1111 does for variation seeds.

    Its "vectors" are the columns of each channel, for it takes norms along the first axis after the channels. Where
    they are nearly parallel (mean cosine above 0.9995) it goes along a straight line, backwards: low t + high (1 - t).
    A single column that is parallel goes along a straight line too, where A1111 divides by zero.
    """
    t = _FLOAT32(t)
    length_low, length_high = (np.sqrt(np.sum(noise**2, 1, keepdims=True)) for noise in (low, high))
    cosine = np.sum((low / length_low) * (high / length_high), 1, keepdims=True)
    if cosine.mean() > 0.9995:
        return low * t + high * (1 - t)
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.sin(angle)
    parallel = sine == 0
    sine = np.where(parallel, 1, sine)
    of_low, of_high = (np.where(parallel, u, np.sin(u * angle) / sine) for u in (1 - t, t))
    return of_low * low + of_high * high


def centred(
    noise: Float[np.ndarray, "c h_from w_from"],
    around: Float[np.ndarray, "c h w"],
) -> Float[np.ndarray, "c h w"]:
    """`noise` in the middle of `around`: cut where it is larger, surrounded where smaller; A1111's seed resize."""
    placed = around.copy()
    places, pieces = [], []
    for have, want in zip(noise.shape[1:], around.shape[1:], strict=True):
        margin = (want - have) // 2  # rounded down, also below 0
        length = have if margin >= 0 else have + 2 * margin
        places.append(slice(max(margin, 0), max(margin, 0) + length))
        pieces.append(slice(max(-margin, 0), max(-margin, 0) + length))
    placed[:, *places] = noise[:, *pieces]
    return placed


# --- MT19937 ---------------------------------------------------------------------------------------------------------


class TorchCPU:
    """torch's CPU generator."""

    def __init__(self, seed: int):
        # numpy's legacy generator is seeded alike, by Matsumoto & Nishimura's init_genrand; numpy promises to keep it.
        self._twister = np.random.RandomState(seed % 2**32)
        self._spare: np.ndarray = np.zeros(0)  # the second number of a pair that was asked for one by one

    def integers(self, count: int) -> UInt32[np.ndarray, " count"]:
        return self._twister.randint(0, 2**32, count, np.uint32)

    def normal(self, count: int) -> Float[np.ndarray, " count"]:
        """torch.randn has two ways, by the number of numbers: in blocks of 16, or one by one."""
        return self._in_blocks(count) if count >= 16 else self._one_by_one(count)

    def _in_blocks(self, count):
        """Eq. 1 in float32 on u2 and 1 - u1: of 16 uniform numbers 8 are u1, then 8 u2; likewise n1, then n2.

        A last block that is not whole is the last 16 numbers, made anew of 16 further uniform ones.
        """
        whole = count - count % 16
        uniform = self._uniform(count)
        normal = [_box_muller_16(uniform[:whole])]
        if whole < count:
            normal = [normal[0][: count - 16], _box_muller_16(self._uniform(16))]
        return np.concatenate(normal)

    def _uniform(self, count):
        """[0, 1): the low 24 bits of an integer."""
        return (self.integers(count) & (2**24 - 1)).astype(np.float32) * _FLOAT32(2**-24)

    def _one_by_one(self, count):
        """Eq. 1 in float64 on u2, which comes first, and 1 - u1.

        Of a pair one may remain for the next call, however many others come between.
        """
        pairs = -((len(self._spare) - count) // 2)
        words = self.integers(4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
        bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
        u2, u1 = (bits.astype(np.float64) * 2.0**-53).T
        radius, angle = np.sqrt(-2 * np.log1p(-u1)), 2 * np.pi * u2
        made = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
        normal = np.append(self._spare, made)
        self._spare = normal[count:]
        return normal[:count].astype(np.float32)


def _box_muller_16(uniform):
    u1, u2 = uniform.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius = np.sqrt(_FLOAT32(-2) * np.log(_FLOAT32(1) - u1))
    angle = _FLOAT32(2 * np.pi) * u2  # rounded as torch rounds it, which counts more than how cos is computed
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)


# --- Philox ----------------------------------------------------------------------------------------------------------


class Philox:
    """CUDA's generator as torch.randn uses it: number i of draw d is a function of (seed, d, i) alone."""

    def __init__(self, seed: int):
        self._key = np.array([seed % 2**32, seed >> 32], np.uint32)
        self._draws = 0

    def normal(self, count: int) -> Float[np.ndarray, " count"]:
        """n2 of Eq. 1, of the first two of four integers, in float64 with CUDA's constants; n1 is not used."""
        counter = np.zeros((4, count), np.uint32)
        counter[0], counter[2] = self._draws, np.arange(count, dtype=np.uint32)
        self._draws += 1
        first, second = philox(counter, self._key[:, None])[:2].astype(np.float64)
        u1, angle = (first + 0.5) * 2.0**-32, (second + 0.5) * _PER_TURN
        return (np.sqrt(-2 * np.log(u1)) * np.sin(angle)).astype(np.float32)


_PER_TURN = np.float64(np.float32(2.0**-32 * 6.2831855))  # 2 pi / 2^32, as a float32


def philox(
    counter: UInt32[np.ndarray, "4 count"],
    key: UInt32[np.ndarray, "2 count_or_1"],
    rounds: int = 10,
) -> UInt32[np.ndarray, "4 count"]:
    """Philox4x32: four integers for each counter."""
    c, k = counter.astype(np.uint64), key.astype(np.uint64)
    low = np.uint64(2**32 - 1)
    for _ in range(rounds):
        product_0, product_2 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = np.stack(
            [
                product_2 >> np.uint64(32) ^ c[1] ^ k[0],
                product_2 & low,
                product_0 >> np.uint64(32) ^ c[3] ^ k[1],
                product_0 & low,
            ]
        )
        k = (k + np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)) & low
    return c.astype(np.uint32)


SOURCES = {"torch_cpu": TorchCPU, "nv": Philox}
