"""The networks that judge, against torch restatements of pytorch-fid's Inception and of LPIPS on torchvision's VGG16.

With random weights, at sizes where every pool meets an edge. (The true packages gave the same once, at 299 x 299 and
40 x 56: torch-fidelity 0.4.0 within 4e-7, lpips 0.1.4 with its own vgg.pth within 2e-7, relative.)
"""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.checkpoints import judges
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.inception import InceptionV3
from sd_jax.models.perceptual import LPIPS

pytestmark = pytest.mark.parity


def parameters(which, state):
    tree = judges.from_torch(which, {name: lazy(tensor.numpy()) for name, tensor in state.items()}, "the reference")
    return jax.tree.map(lambda tensor: jnp.asarray(np.asarray(tensor)), tree)


def to_torch(x):
    import torch

    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def randomise(module):
    """Weights that keep the size of what passes, biases and statistics that are no constants."""
    import torch

    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if value.ndim == 4:
            value.normal_(0.0, (2.0 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(1.0 if name.endswith("bn.weight") else 0.0, 0.1)
    return module.eval()


def inception():
    from torch import cat, nn
    from torch.nn import functional as F

    class Conv(nn.Sequential):
        def __init__(self, width, features, size, **kwargs):
            layers = {
                "conv": nn.Conv2d(width, features, size, bias=False, **kwargs),
                "bn": nn.BatchNorm2d(features, eps=0.001),
            }
            super().__init__(OrderedDict(layers, relu=nn.ReLU()))

    def average(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    class A(nn.Module):
        def __init__(self, width, pool):
            super().__init__()
            self.branch1x1 = Conv(width, 64, 1)
            self.branch5x5_1, self.branch5x5_2 = Conv(width, 48, 1), Conv(48, 64, 5, padding=2)
            self.branch3x3dbl_1 = Conv(width, 64, 1)
            self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)
            self.branch_pool = Conv(width, pool, 1)

        def forward(self, x):
            five = self.branch5x5_2(self.branch5x5_1(x))
            three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
            return cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)

    class B(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch3x3 = Conv(288, 384, 3, stride=2)
            self.branch3x3dbl_1 = Conv(288, 64, 1)
            self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(64, 96, 3, padding=1), Conv(96, 96, 3, stride=2)

        def forward(self, x):
            twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
            return cat([self.branch3x3(x), twice, F.max_pool2d(x, 3, stride=2)], 1)

    class C(nn.Module):
        def __init__(self, width):
            super().__init__()
            across, down = {"padding": (0, 3)}, {"padding": (3, 0)}
            self.branch1x1 = Conv(768, 192, 1)
            self.branch7x7_1 = Conv(768, width, 1)
            self.branch7x7_2 = Conv(width, width, (1, 7), **across)
            self.branch7x7_3 = Conv(width, 192, (7, 1), **down)
            self.branch7x7dbl_1 = Conv(768, width, 1)
            self.branch7x7dbl_2 = Conv(width, width, (7, 1), **down)
            self.branch7x7dbl_3 = Conv(width, width, (1, 7), **across)
            self.branch7x7dbl_4 = Conv(width, width, (7, 1), **down)
            self.branch7x7dbl_5 = Conv(width, 192, (1, 7), **across)
            self.branch_pool = Conv(768, 192, 1)

        def forward(self, x):
            once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
            twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
            twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
            return cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)

    class D(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
            self.branch7x7x3_1 = Conv(768, 192, 1)
            self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
            self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
            self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

        def forward(self, x):
            seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
            return cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)

    class E(nn.Module):
        def __init__(self, width, pool):
            super().__init__()
            across, down = {"padding": (0, 1)}, {"padding": (1, 0)}
            self.branch1x1 = Conv(width, 320, 1)
            self.branch3x3_1 = Conv(width, 384, 1)
            self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3), **across), Conv(384, 384, (3, 1), **down)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width, 448, 1), Conv(448, 384, 3, padding=1)
            self.branch3x3dbl_3a = Conv(384, 384, (1, 3), **across)
            self.branch3x3dbl_3b = Conv(384, 384, (3, 1), **down)
            self.branch_pool = Conv(width, 192, 1)
            self.pool = pool

        def forward(self, x):
            once = self.branch3x3_1(x)
            twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
            parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
            parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
            return cat([*parts, self.branch_pool(self.pool(x))], 1)

    network = nn.Sequential(
        OrderedDict(
            Conv2d_1a_3x3=Conv(3, 32, 3, stride=2),
            Conv2d_2a_3x3=Conv(32, 32, 3),
            Conv2d_2b_3x3=Conv(32, 64, 3, padding=1),
            pool1=nn.MaxPool2d(3, stride=2),
            Conv2d_3b_1x1=Conv(64, 80, 1),
            Conv2d_4a_3x3=Conv(80, 192, 3),
            pool2=nn.MaxPool2d(3, stride=2),
            Mixed_5b=A(192, 32),
            Mixed_5c=A(256, 64),
            Mixed_5d=A(288, 64),
            Mixed_6a=B(),
            Mixed_6b=C(128),
            Mixed_6c=C(160),
            Mixed_6d=C(160),
            Mixed_6e=C(192),
            Mixed_7a=D(),
            Mixed_7b=E(1280, average),
            Mixed_7c=E(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1)),
            avgpool=nn.AdaptiveAvgPool2d(1),
        )
    )
    return randomise(network)


def test_inception(relative_error):
    torch = pytest.importorskip("torch")
    model = inception()
    levels = np.random.default_rng(0).uniform(0, 255, (2, 107, 139, 3)).astype(np.float32)  # 2 x 3 places at the end
    with torch.no_grad():
        expected = model((to_torch(levels) - 128) / 128).flatten(1).numpy()
    assert expected.shape == (2, 2048) and expected.std() > 0.1
    params = parameters(judges.INCEPTION, model.state_dict())
    ours = jax.jit(lambda params, x: InceptionV3().apply({"params": params}, x))(params, levels)
    assert relative_error(ours, expected) < 1e-5


class Restated:
    """LPIPS 0.1 on VGG16, in torch."""

    widths = (64, 128, 256, 512, 512)

    def __init__(self):
        import torch
        from torch import nn

        layers, width = [], 3
        for features, depth in zip(self.widths, (2, 2, 3, 3, 3), strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(width, features, 3, padding=1), nn.ReLU()]
                width = features
            layers.append(nn.MaxPool2d(2))
        self.vgg = randomise(nn.ModuleDict({"features": nn.Sequential(*layers[:-1])}))
        weights = enumerate(torch.rand(1, width, 1, 1) for width in self.widths)
        self.weights = {f"lin{i}.model.1.weight": value for i, value in weights}

    def __call__(self, a, b):
        import torch

        mean, deviation = (
            torch.tensor(values)[None, :, None, None] for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        )
        total, pair = 0.0, [(x - mean) / deviation for x in (a, b)]
        for index, layer in enumerate(self.vgg["features"]):
            pair = [layer(x) for x in pair]
            if index in (3, 8, 15, 22, 29):
                unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in pair]
                weights = self.weights[f"lin{(3, 8, 15, 22, 29).index(index)}.model.1.weight"]
                total = total + ((unit[0] - unit[1]).square() * weights).sum(1).mean((1, 2))
        return total


def test_lpips_and_its_gradient(relative_error):
    pytest.importorskip("torch")
    model = Restated()
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32) for _ in range(2))
    moved = to_torch(b).requires_grad_()
    expected = model(to_torch(a), moved)
    expected.sum().backward()
    params = parameters(judges.VGG16, model.vgg.state_dict()) | parameters(judges.LPIPS_WEIGHTS, model.weights)

    def distance(b):
        each = LPIPS().apply({"params": params}, a, b)
        return each.sum(), each

    gradient, ours = jax.jit(jax.grad(distance, has_aux=True))(jnp.asarray(b))
    assert relative_error(ours, expected.detach().numpy()) < 1e-5
    assert relative_error(gradient, moved.grad.permute(0, 2, 3, 1).numpy()) < 1e-4
