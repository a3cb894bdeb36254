"""The aesthetic heads equal a restatement of LAION's in torch, and read the files that torch writes."""

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.checkpoints import aesthetic, files
from sd_jax.models.aesthetic import KINDS, AestheticHead

pytestmark = pytest.mark.parity


def reference(kind: str, width: int):
    """LAION's modules, written anew."""
    from torch import nn

    if kind == "linear":
        return nn.Linear(width, 1)
    widths, dropout = (width, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1, 0.0, 0.0)
    layers = []
    for i in range(5):
        layers.append(nn.Linear(widths[i], widths[i + 1]))
        if kind == "mlp_relu" and i < 4:
            layers.append(nn.ReLU())
        if i < 3:
            layers.append(nn.Dropout(dropout[i]))
    model = nn.Module()
    model.layers = nn.Sequential(*layers)
    return model


@pytest.mark.parametrize("width", [768, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch(tmp_path, kind, width):
    import torch

    torch.manual_seed(0)
    model = reference(kind, width).eval()
    features = torch.randn(7, width) * 10
    normalised = features / features.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        expected = (model if kind == "linear" else model.layers)(normalised)[:, 0].numpy()
    for name, legacy in (("zip.pth", False), ("legacy.pth", True)):
        torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
        config, params = aesthetic.load(tmp_path / name)
        assert (config.kind, config.width) == (kind, width)
        found = AestheticHead(config).apply(params, jnp.asarray(features.numpy()))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # And back into torch
    aesthetic.save(tmp_path / "back.safetensors", config, params)
    back = {name: torch.from_numpy(array) for name, array in files.read(tmp_path / "back.safetensors").items()}
    model.load_state_dict(back)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back[name])
