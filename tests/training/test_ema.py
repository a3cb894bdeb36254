"""The running averages against their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.training import ema


@pytest.mark.parametrize("decays", [(0.5,), (0.9999, 0.5, 0.999)])
def test_every_average_follows_its_formula(decays):
    rng = np.random.default_rng(0)
    names = [f"{decay:g}" for decay in decays]
    start = rng.normal(size=(3, 2)).astype(np.float32)
    averages = {name: {"unet": {"kernel": jnp.asarray(start)}} for name in names}
    want = {name: start.astype(np.float64) for name in names}
    update = jax.jit(ema.update, static_argnames="decays")
    for step in range(30):
        params = rng.normal(size=(3, 2)).astype(np.float32)
        averages = update(averages, {"unet": {"kernel": jnp.asarray(params)}}, jnp.int32(step), decays=decays)
        for name, decay in zip(names, decays, strict=True):
            d = min(decay, (1 + step) / (10 + step))
            want[name] = d * want[name] + (1 - d) * params
    assert set(averages) == set(names)
    for name in names:
        np.testing.assert_allclose(averages[name]["unet"]["kernel"], want[name], rtol=2e-6, atol=1e-6)


def test_a_decay_without_an_average():
    with pytest.raises(KeyError, match="0.9"):
        ema.update({"0.99": {"a": jnp.zeros(1)}}, {"a": jnp.ones(1)}, jnp.int32(0), (0.9,))
