"""Multiplications and additions of the matrix products and convolutions of a traced function: two for each pair.

This is the count of papers and of utilisation figures ("model FLOPs"). Element-wise work is left out. Of a convolution
every place of the kernel counts at every place of the output, the padding's too, as in the textbook's formula

    2 x batch x (places of the output) x (places of the kernel) x (channels in / groups) x (channels out)      (Eq. 1)

but zeros put between the input's numbers (`lhs_dilation`, in the gradient of a strided convolution) do not: so each
gradient of a padded convolution takes as much as it does. XLA's cost analysis leaves the padding out as well.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core


def count(function: Callable, *inputs) -> float:
    """Of what `function` traces to; `inputs` are arrays or shapes. What is computed twice to save memory counts twice.

    A scan counts as often as it runs, a `while` once (how often it runs is not known), of a `cond` the dearest branch.
    """
    return _walk(jax.make_jaxpr(function)(*inputs).jaxpr)[0]


def count_gradient(function: Callable, params, *inputs) -> float:
    """Of `function(params, *inputs)` (a scalar) and of its gradient by `params`, each product counted once.

    Whatever `jax.checkpoint` computes again is left out: the backward pass is what depends on the loss' cotangent.
    """

    def both(cotangent, params, *inputs):
        loss, pull = jax.vjp(lambda params: function(params, *inputs), params)
        return loss, pull(cotangent.astype(loss.dtype))

    jaxpr = jax.make_jaxpr(both)(jax.ShapeDtypeStruct((), jnp.float32), params, *inputs).jaxpr
    depends = [True] + [False] * (len(jaxpr.invars) - 1)
    return _walk(jaxpr, depends, rest=True)[0]


def _walk(jaxpr: core.Jaxpr, depends: list[bool] | None = None, rest: bool = False) -> tuple[float, list[bool]]:
    """-> the count, and which outputs depend on what the marked inputs are. Only equations that do are counted, and
    with `rest` those that do not as well, as a whole; without `depends` all are."""
    everything = depends is None
    marked = set() if everything else {var for var, on in zip(jaxpr.invars, depends, strict=True) if on}
    total = 0.0

    def is_marked(atom) -> bool:
        return not isinstance(atom, core.Literal) and atom in marked

    for equation in jaxpr.eqns:
        on = [is_marked(atom) for atom in equation.invars]
        if everything or (rest and not any(on)):
            total += _equation(equation, None)[0]
            continue
        if not any(on):
            continue
        flops, out = _equation(equation, on)
        total += flops
        marked.update(var for var, yes in zip(equation.outvars, out, strict=True) if yes)
    return total, [is_marked(atom) for atom in jaxpr.outvars]


def _equation(equation: core.JaxprEqn, on: list[bool] | None) -> tuple[float, list[bool]]:
    name, params = equation.primitive.name, equation.params
    all_out = [True] * len(equation.outvars)
    if name == "dot_general":
        return _dot(equation), all_out
    if name == "conv_general_dilated":
        return _convolution(equation), all_out
    bodies = _bodies(params)
    if not bodies:
        return 0.0, all_out
    if name == "cond":
        walked = [_walk(body, None if on is None else on[1:]) for body in bodies]
        return max(flops for flops, _ in walked), all_out
    if name == "scan":
        body, consts, carry = bodies[0], params["num_consts"], params["num_carry"]
        flops, out = _walk(body, on)
        while on is not None:  # what depends after one round does so in the next
            again = list(on)
            for i in range(carry):
                again[consts + i] = on[consts + i] or out[i]
            if again == on:
                break
            on = again
            flops, out = _walk(body, on)
        return params["length"] * flops, out
    if len(bodies) == 1 and len(bodies[0].invars) == len(equation.invars):
        flops, out = _walk(bodies[0], on)
        return flops, out if len(out) == len(all_out) else all_out
    return sum(_walk(body)[0] for body in bodies), all_out


def _bodies(params: dict) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


def _dot(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: core.JaxprEqn) -> float:
    """(Eq. 1). The kernel's input axis has the channels of one group, so groups need no division; `batch_group_count`
    (in gradients of grouped convolutions) splits the batch, and each output channel sees its part alone."""
    params, kernel = equation.params, equation.invars[1].aval.shape
    per_output = math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * per_output * math.prod(equation.outvars[0].aval.shape) / math.prod(params["lhs_dilation"])
