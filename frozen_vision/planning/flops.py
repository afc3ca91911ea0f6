"""FLOPs of a function's matrix products and convolutions, counted from its trace; nothing is compiled or run.

A compiler's own figure counts the body of a loop once, however often it runs. Here a scan counts in full.
"""

from collections.abc import Callable
import math
from typing import Any

import jax


def count(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of all `dot_general` and `conv_general_dilated` that `function(*args)` runs, two per multiply-add.

  Bodies of loops whose number of rounds depends on data (RoIAlign's tiles) count as zero: add them by a
  formula. Of a `cond`, the most expensive branch counts. Padding counts as if it were data, and what nobody
  reads as if it were read.

  Args:
    function: traceable by jax.
    args: arrays or `jax.ShapeDtypeStruct`s, in any tree.
  """
  return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr(jaxpr: Any) -> int:
  """`count` of what is traced already."""
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
  params = equation.params
  match equation.primitive.name:
    case "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      return 2 * depth * equation.outvars[0].aval.size
    case "conv_general_dilated":
      kernel = equation.invars[1].aval
      depth = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
      return 2 * depth * equation.outvars[0].aval.size
    case "scan":
      return params["length"] * count_jaxpr(params["jaxpr"].jaxpr)
    case "while":
      return 0
    case "cond":
      return max(count_jaxpr(branch.jaxpr) for branch in params["branches"])
  # Calls of every kind, forward passes of custom derivatives among them, have their bodies in their
  # parameters.
  return sum(count_jaxpr(body) for value in params.values() for body in _bodies(value))


def _bodies(value: Any) -> list[Any]:
  if hasattr(value, "eqns"):
    return [value]
  if hasattr(value, "jaxpr"):
    return _bodies(value.jaxpr)
  return []
