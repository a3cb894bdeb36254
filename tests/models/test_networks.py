import jax
import pytest

from sd_jax.models.networks import Networks
from sd_jax.models.presets import SD15, TINY, ModelSpec


def test_same_spec_and_dtype_give_equal_hashable_networks():
    """Else every new pipeline would compile anew."""
    assert hash(Networks.of(TINY)) == hash(Networks.of(TINY)) and Networks.of(TINY) == Networks.of(TINY)
    assert Networks.of(TINY) != Networks.of(TINY, "bfloat16")


def test_scaling_factor_reaches_spec_and_module():
    networks = Networks.of(TINY).with_scaling_factor(0.5)
    assert networks.spec.vae.scaling_factor == networks.vae.config.scaling_factor == 0.5


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_parts_initialise_from_the_smallest_inputs(part):
    shapes = jax.eval_shape(lambda key: Networks.of(TINY).init(part, key), jax.random.key(0))
    assert jax.tree.leaves(shapes)


def test_spec_survives_json():
    assert ModelSpec.from_dict(SD15.to_dict()) == SD15
    with pytest.raises(TypeError, match="colour"):
        ModelSpec.from_dict(SD15.to_dict() | {"vae": {"colour": 1}})
