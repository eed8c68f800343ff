"""Refuses a per-token function whose result for a token depends on other tokens.

A function that is applied to a chunk of tokens at a time must treat each of them by itself: a sum over tokens would be
one over whichever tokens share its chunk. The function is traced with a number of tokens that occurs nowhere else, so
that the token axis can be told by its size, and every operation is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

from jaxrl_post.types import PyTree

PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097)
"""Numbers of tokens to trace with. A prime is no product of other axes that a reshape could merge or split."""

ADVICE = (
    "The loss is computed in chunks of tokens, so that of a token may depend on its own numbers only. For a loss over "
    "sequences, groups or the batch take token_logprob, whose [N] outputs may be combined freely; what is computed "
    "beforehand (advantages, weights, lengths) comes in through aux"
)

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type
    cbrt ceil clamp clz convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1
    floor ge gt igamma igammac integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul
    name ne neg nextafter not optimization_barrier or polygamma population_count pow reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta""".split()  # noqa: SIM905
)
# These keep every axis that is longer than one: an axis of the token axis's size in the result is the token axis, or a
# number that is the same for all tokens.
AXES_KEPT = frozenset({"broadcast_in_dim", "squeeze", "transpose"})
# Parameters that name the axes which an operation works along.
ALONG = ("axes", "axis", "dimension", "dimensions")
CALLS = frozenset(
    """jit pjit closed_call core_call remat checkpoint remat2 custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr cond
    while""".split()  # noqa: SIM905
)


def check_independent(function: Callable[..., Any], arguments: PyTree, name: str) -> None:
    """Raise unless `function` maps arrays `[n, ...]` to one float array `[n]`, each token by itself.

    Args:
        function: a pure function of `arguments`.
        arguments: tuple of pytrees of `jax.ShapeDtypeStruct`, of which only the axes after the first matter.
        name: the function's name, for messages.

    Raises:
        ValueError: naming the operation that mixes tokens, or the wrong result.
    """
    leaves = jax.tree.leaves(arguments)
    used = {size for leaf in leaves for size in leaf.shape}
    tokens = next(size for size in PRIMES if size not in used)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((tokens, *x.shape[1:]), x.dtype), arguments)
    try:
        traced, result = jax.make_jaxpr(function, return_shape=True)(*structs)
    except Exception as error:
        error.add_note(
            f"{name} was called with arrays of a chunk of {tokens} tokens; an array with a number for every token must "
            "come in through aux, not by closure, and statistics that are not among outputs are None"
        )
        raise
    found = jax.tree.leaves(result)
    if len(found) != 1 or found[0].shape != (tokens,) or not jnp.issubdtype(found[0].dtype, jnp.floating):
        got = ", ".join(str(x).replace(str(tokens), "n") for x in found) or "nothing"
        raise ValueError(f"{name} must return the losses [n] of n tokens, one float array, got {got}. {ADVICE}")
    _check(traced.jaxpr, tokens, name)


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())


def _check(jaxpr: Jaxpr, tokens: int, name: str) -> None:
    for equation in jaxpr.eqns:
        variables = [v for v in (*equation.invars, *equation.outvars) if not isinstance(v, Literal)]
        if any(tokens in _shape(v) for v in variables) and not _fine(equation, tokens):
            raise ValueError(f"{name} mixes tokens: its `{equation.primitive.name}` works along their axis. {ADVICE}")
        for body in jaxprs_in_params(equation.params):
            _check(body, tokens, name)


def _fine(equation: Any, tokens: int) -> bool:
    """Whether an operation that touches token axes leaves each token by itself."""
    primitive, params = equation.primitive.name, equation.params
    ins, outs = [_shape(v) for v in equation.invars], [_shape(v) for v in equation.outvars]
    if any(shape.count(tokens) > 1 for shape in (*ins, *outs)):
        return False  # pairs of tokens
    if primitive in ELEMENTWISE or primitive in AXES_KEPT or primitive in CALLS:
        return True
    if primitive == "scan":
        return params["length"] != tokens  # a loop, but not over tokens
    axes = [shape.index(tokens) if tokens in shape else None for shape in ins]
    axis = next((a for a in axes if a is not None), None)
    out_axis = outs[0].index(tokens) if outs and tokens in outs[0] else None
    if primitive == "iota":
        return params["dimension"] != out_axis  # a place in the chunk says nothing of the token
    if axis is None or (out_axis is None and equation.outvars):
        return False
    match primitive:
        case "reshape":
            before, after = _product(ins[0][:axis]), _product(outs[0][:out_axis])
            return params.get("dimensions") is None and before == after
        case "slice":
            return params["strides"] is None or params["strides"][axis] == 1
        case "dynamic_slice":
            return axes[0] == out_axis
        case "dynamic_update_slice":
            return axes[0] == axes[1] == out_axis
        case "pad":
            return tuple(params["padding_config"][axis]) == (0, 0, 0)
        case "gather":
            return _fine_gather(params["dimension_numbers"], params["slice_sizes"], *axes[:2])
        case "dot_general":
            _, batch = params["dimension_numbers"]
            # A contraction would have lost the axis; two axes of tokens must be one batch.
            return None in axes or (axes[0] in batch[0] and batch[1][tuple(batch[0]).index(axes[0])] == axes[1])
        case "stack":
            return True  # a new axis
        case "concatenate" | "split" | "rev" | "sort" | "argmax" | "argmin":
            return axis not in _along(params)
    if primitive.startswith(("reduce_", "cum")):
        return axis not in _along(params)
    return False


def _along(params: dict[str, Any]) -> set[int]:
    values = [params[key] for key in ALONG if key in params]
    return {axis for value in values for axis in ((value,) if isinstance(value, int) else value)}


def _fine_gather(numbers: Any, slice_sizes: tuple[int, ...], operand_axis: int | None, index_axis: int | None) -> bool:
    if operand_axis is None:
        return True  # a table that all tokens read
    if index_axis is None:
        return slice_sizes[operand_axis] > 1  # whole, or the result had lost the axis
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    return (operand_axis, index_axis) in set(pairs)


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
