"""Hypernetworks, A1111's: small networks that change what attention makes its keys and its values of.

    k = to_k(x + t h_k(x)),    v = to_v(x + t h_v(x))                                                    (1)

x is what the attention reads: the text's states in cross-attention, the picture's features in self-attention. One pair
h_k, h_v serves every attention that reads states of one width (768 of SD 1's text, 320, 640 and 1280 of its features);
other widths stay as they are. Several hypernetworks apply one after the other. Of layers i, widths as in
`layer_structure` times that of x, each h is

    x <- dropout_i(norm_i(activation(W_i x + b_i)))                                                      (2)

where the norm may be missing, dropout is for training alone, and the last layer has an activation only with
`activate_output`.

Semantics: A1111 stable-diffusion-webui, modules/hypernetworks/hypernetwork.py.
"""

import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from sd_jax.models.presets import ModelSpec
from sd_jax.names import hint
from sd_jax.types import AnyArray

_EPSILON = 1e-5  # of torch.nn.LayerNorm

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {  # by A1111's names: torch's classes in lower case, and "swish"
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "leakyrelu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "swish": jax.nn.hard_swish,  # what A1111 calls so
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "celu": jax.nn.celu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "hardshrink": lambda x: jnp.where(jnp.abs(x) > 0.5, x, 0),
    "hardsigmoid": jax.nn.hard_sigmoid,
    "hardswish": jax.nn.hard_swish,
    "hardtanh": jax.nn.hard_tanh,
    "logsigmoid": jax.nn.log_sigmoid,
    "mish": jax.nn.mish,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "softshrink": lambda x: jnp.sign(x) * jax.nn.relu(jnp.abs(x) - 0.5),
    "softsign": jax.nn.soft_sign,
    "tanhshrink": lambda x: x - jnp.tanh(x),
}

# Standard deviation of the weights, from the numbers of inputs and outputs, and whether they are uniform
INITIALISATIONS: dict[str, tuple[Callable[[int, int], float], bool]] = {
    "normal": (lambda inputs, outputs: 0.01, False),
    "xavier_uniform": (lambda inputs, outputs: (2 / (inputs + outputs)) ** 0.5, True),  # Glorot & Bengio 2010
    "xavier_normal": (lambda inputs, outputs: (2 / (inputs + outputs)) ** 0.5, False),
    "kaiming_uniform": (lambda inputs, outputs: (2 / inputs) ** 0.5, True),  # He et al. 2015
    "kaiming_normal": (lambda inputs, outputs: (2 / inputs) ** 0.5, False),
}


@flax.struct.dataclass
class Hypernetwork:
    """Weights and their strength; what else it is decides the compiled function.

    layers: {"768": {"k": [layer, ...], "v": [layer, ...]}, ...} by the width of what is changed; a layer holds `weight`
    (outputs, inputs) and `bias` (outputs,), and where there is a layer norm `norm_weight` and `norm_bias` (outputs,).
    strength: t of Eq. 1.
    layer_structure: widths, in those of x, before and behind each layer. dropout: the share of numbers that training
    drops at each of these places (A1111's dropout_structure).
    """

    layers: dict[str, dict[str, list[dict[str, AnyArray]]]]
    strength: Float[AnyArray, ""] | np.floating = np.float32(1)
    layer_structure: tuple[int | float, ...] = flax.struct.field(pytree_node=False, default=(1, 2, 1))
    activation: str = flax.struct.field(pytree_node=False, default="linear")  # of ACTIVATIONS
    activate_output: bool = flax.struct.field(pytree_node=False, default=False)
    dropout: tuple[int | float, ...] = flax.struct.field(pytree_node=False, default=(0, 0, 0))

    @property
    def layer_norm(self) -> bool:
        return any("norm_weight" in leaf for leaf in next(iter(self.layers.values()))["k"])


def init(
    key: PRNGKeyArray,
    widths: Sequence[int],  # of what is changed: SD 1's are 320, 640, 768, 1280
    layer_structure: Sequence[int | float] = (1, 2, 1),
    activation: str = "linear",  # of ACTIVATIONS
    layer_norm: bool = False,
    weight_init: str = "normal",  # of INITIALISATIONS
    activate_output: bool = False,
    dropout: Sequence[int | float] | None = None,  # at each place of layer_structure; None = nowhere
) -> Hypernetwork:
    """A new one, float32, as A1111 makes it: biases are 0, and the weights of layer norms, too, near 0.

    So it changes little at first. Raises ValueError for a structure that is none, and for unknown names.
    """
    dropout = (0,) * len(layer_structure) if dropout is None else tuple(dropout)
    check(layer_structure, activation, dropout)
    if weight_init not in INITIALISATIONS:
        raise ValueError(f"weight_init={weight_init!r} is unknown: {hint(weight_init, INITIALISATIONS)}")
    if not widths:
        raise ValueError("a hypernetwork of no widths changes nothing: give those of the text and of the attentions")
    keys = iter(jax.random.split(key, 4 * len(widths) * (len(layer_structure) - 1)))

    def layer(inputs: int, outputs: int) -> dict[str, Array]:
        leaves = {
            "weight": _random(next(keys), (outputs, inputs), *INITIALISATIONS[weight_init]),
            "bias": jnp.zeros(outputs),
        }
        own = next(keys)
        if layer_norm:
            leaves |= {"norm_weight": 0.01 * jax.random.normal(own, (outputs,)), "norm_bias": jnp.zeros(outputs)}
        return leaves

    def network(width: int) -> list[dict[str, Array]]:
        sizes = [int(width * times) for times in layer_structure]
        return [layer(*pair) for pair in zip(sizes, sizes[1:], strict=False)]

    layers = {str(width): {which: network(width) for which in "kv"} for width in widths}
    return Hypernetwork(
        layers, np.float32(1), tuple(layer_structure), activation, activate_output=activate_output, dropout=dropout
    )


def check(layer_structure: Sequence[int | float], activation: str, dropout: Sequence[int | float]) -> None:
    """Raises ValueError where there are no such hypernetworks."""
    ends = (*layer_structure[:1], *layer_structure[-1:])
    if len(layer_structure) < 2 or ends != (1, 1) or not all(0 < times < math.inf for times in layer_structure):
        raise ValueError(f"layer_structure={layer_structure}: give widths that begin and end with 1, such as 1, 2, 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: {hint(activation, ACTIVATIONS)}")
    if len(dropout) != len(layer_structure) or dropout[0] or not all(0 <= rate < 1 for rate in dropout):
        raise ValueError(
            f"dropout={dropout}: give as many shares as layer_structure has widths, from 0 to below 1, the first one 0"
        )


def widths_of(spec: ModelSpec) -> tuple[int, ...]:
    """Of the states that a U-Net's attentions read: the text's, and its features'."""
    unet = spec.unet
    attend = [width for width, has in zip(unet.block_out_channels, unet.attention_blocks, strict=True) if has]
    return tuple(sorted({unet.cross_attention_dim, *attend, unet.block_out_channels[-1]}))  # the middle attends too


def check_fits(hypernetwork: Hypernetwork, spec: ModelSpec) -> None:
    """Raises ValueError where it is for states of a width that nothing in this model has: it is another family's."""
    there = widths_of(spec)
    odd = [width for width in hypernetwork.layers if int(width) not in there]
    if odd:
        raise ValueError(
            f"a hypernetwork for states that are {', '.join(odd)} wide, and this model's are "
            f"{', '.join(map(str, there))}: take one that was made for this family"
        )


def apply(
    hypernetwork: Hypernetwork,
    context: Float[Array, "rows width"],  # x of Eq. 1
    which: str,  # "k" | "v": what is to be made of it
    width: int,  # of the context
    keys: Key[Array, " batch"] | None = None,  # of the dropout, for each picture whose rows these are, in their order
) -> Float[Array, "rows width"]:
    """x + t h(x) of Eq. 1, in the dtype of x; x itself where the hypernetwork has nothing for such a width.

    keys=None: nothing is dropped, as when pictures are made.
    """
    networks = hypernetwork.layers.get(str(width))
    if networks is None:
        return context
    activation, x, last = ACTIVATIONS[hypernetwork.activation], context, len(networks[which]) - 1
    for i, (layer, rate) in enumerate(zip(networks[which], hypernetwork.dropout[1:], strict=True)):
        leaves = {name: jnp.asarray(leaf, x.dtype) for name, leaf in layer.items()}
        x = x @ leaves["weight"].T + leaves["bias"][None]
        x = activation(x) if i < last or hypernetwork.activate_output else x
        if "norm_weight" in leaves:
            x = _normalised(x) * leaves["norm_weight"][None] + leaves["norm_bias"][None]
        if keys is not None and rate:
            x = jnp.where(_kept(keys, 2 * i + ("k", "v").index(which), 1 - rate, x.shape), x / (1 - rate), 0)
    return context + jnp.asarray(hypernetwork.strength, x.dtype) * x


def _kept(keys: Key[Array, " batch"], draw: int, share: float, shape: tuple[int, ...]) -> Array:
    """What dropout leaves: each picture draws for itself, so that how a batch is cut changes no draw."""
    one = lambda key: jax.random.bernoulli(jax.random.fold_in(key, draw), share, (shape[0] // len(keys), shape[1]))  # noqa: E731
    return jax.vmap(one)(keys).reshape(shape)


def _normalised(x: Array) -> Array:
    rows = x.astype(jnp.float32)
    centred = rows - rows.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + _EPSILON)).astype(x.dtype)


def _random(key: PRNGKeyArray, shape: tuple[int, int], deviation: Callable[[int, int], float], uniform: bool) -> Array:
    outputs, inputs = shape
    scale = deviation(inputs, outputs)
    if uniform:
        return jax.random.uniform(key, shape, minval=-(3**0.5) * scale, maxval=3**0.5 * scale)
    return scale * jax.random.normal(key, shape)
