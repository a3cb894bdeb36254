"""The model in the package, as diffusers sees it."""

import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax.sampling.pipeline import BUNDLED
from tests.reference import diffusers

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def test_diffusers_opens_the_bundled_model_and_predicts_the_same():
    theirs = diffusers().StableDiffusionPipeline.from_pretrained(BUNDLED)
    import torch

    theirs = theirs.to(torch.float32)
    ours = sd_jax.load()
    prompt = "a large red circle in the top left on a plain white background"
    ids = theirs.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
    np.testing.assert_array_equal(ids.numpy(), ours.tokenizer([prompt], ids.shape[1]))
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, ours.spec.vae.latent_channels)).astype(np.float32)
    with torch.no_grad():
        context = theirs.text_encoder(ids).last_hidden_state
        x = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
        wanted = theirs.unet(x, torch.tensor([500.0]), encoder_hidden_states=context).sample
    conditioning = ours.encode_tokens(ids.numpy())
    np.testing.assert_allclose(conditioning.context, context.numpy(), atol=1e-4)
    got = ours.predict(latents, jnp.array([500.0]), conditioning)
    wanted = wanted.numpy().transpose(0, 2, 3, 1)
    assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted)
