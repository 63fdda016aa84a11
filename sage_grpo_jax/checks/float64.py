"""Evaluates a float32 program in float64, whatever types its layers ask for by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_NARROW = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16))
# Call-like primitives: the parameter that holds what is called. Own derivative rules are dropped,
# the derivative of the float64 program is taken instead.
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
_INLINED += ("custom_jvp_call", "custom_vjp_call")
_SKIPPED = ("sharding_constraint", "reduce_precision", "optimization_barrier")
# Their results depend on the width of their inputs in bits.
_REFUSED = ("bitcast_convert_type", "random_bits", "while", "cond", "pallas_call", "shard_map")


def in_float64(function: Callable, *inputs: Any) -> Callable:
    """`function` with every float32, bfloat16 and float16 number in it a float64.

    Traced once with the shapes and types of `inputs`; the result takes the same trees with float64
    leaves, inside `jax.enable_x64`, and can be differentiated. Casts to a narrow type are dropped,
    so that what a layer computes in float32 by name is float64 too; own derivative rules of
    functions give way to the derivative of what they compute. Constants keep their values.

    Raises:
      NotImplementedError: the function holds a primitive whose result depends on the width of its
        inputs, or a kernel, or a loop other than scan.
    """
    # The program is taken as it is in float32: every cast that a layer asks for is an equation of
    # it, which can be run with other types.
    traced, out_shape = jax.make_jaxpr(function, return_shape=True)(*inputs)
    tree = jax.tree.structure(out_shape)
    wanted = [leaf.shape for leaf in jax.tree.leaves(inputs)]

    def widened(*values: Any) -> Any:
        leaves = jax.tree.leaves(values)
        if [leaf.shape for leaf in leaves] != wanted:
            raise ValueError("in_float64: must be called with the shapes that it was traced with")
        return jax.tree.unflatten(tree, _evaluate(traced.jaxpr, traced.consts, leaves))

    return widened


def _evaluate(jaxpr: core.Jaxpr, consts: Any, inputs: Any) -> list[Any]:
    """Runs a traced program with wide types."""
    values: dict[core.Var, Any] = {}

    def read(atom: core.Atom) -> Any:
        if not isinstance(atom, core.Literal):
            return values[atom]
        return widen(np.asarray(atom.val, atom.aval.dtype))

    for variable, value in zip(jaxpr.constvars, consts, strict=True):
        values[variable] = widen(value)
    values.update(zip(jaxpr.invars, inputs, strict=True))
    # The program is run as the interpreter of JAX does it, equation by equation.
    for equation in jaxpr.eqns:
        results = _apply(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _REFUSED:
        raise NotImplementedError(f"in_float64: the program holds {name}")

    if name in _SKIPPED:
        return inputs
    # What is called runs with wide types too. A derivative rule of its own would have been written
    # for float32, so it is left out.
    if name in _INLINED:
        inner = next(params[key] for key in _CALLS if key in params)
        return _evaluate(*_open(inner), inputs)
    if name == "scan":
        return _scan(params, inputs)
    if name == "scatter-add":
        # The sum of two numbers is part of its parameters, in the types that it was traced with.
        rest = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
        return [jax.lax.scatter_add(*inputs, params["dimension_numbers"], **rest)]

    # Everything else takes the type of its inputs; only types among its parameters are changed.
    params = {key: _wide_type(value) for key, value in params.items()}
    if name == "convert_element_type" and inputs[0].dtype == params["new_dtype"]:
        return inputs
    result = equation.primitive.bind(*inputs, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def _open(jaxpr: Any) -> tuple[core.Jaxpr, Any]:
    """(program, constants) of a closed or an open one."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _scan(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    # A scan takes constants, then what it carries, then what it slices.
    program, consts = _open(params["jaxpr"])
    fixed, carried = params["num_consts"], params["num_carry"]

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _evaluate(program, consts, [*inputs[:fixed], *carry, *slices])
        return results[:carried], results[carried:]

    first, slices = inputs[fixed : fixed + carried], inputs[fixed + carried :]
    carry, stacked = jax.lax.scan(
        body, first, slices, length=params["length"], reverse=params["reverse"]
    )
    return [*carry, *stacked]


def _wide_type(value: Any) -> Any:
    """A parameter of a primitive, float64 where it names a narrow type."""
    try:
        is_type = isinstance(value, (type, np.dtype)) and np.dtype(value) in _NARROW
    except TypeError:
        return value
    return np.dtype(np.float64) if is_type else value


def widen(value: Any) -> Any:
    """An array, float64 if it is a narrow float."""
    if getattr(value, "dtype", None) not in _NARROW:
        return value
    is_tracer = isinstance(value, jax.core.Tracer)
    return value.astype(np.float64) if is_tracer else np.asarray(value, np.float64)
