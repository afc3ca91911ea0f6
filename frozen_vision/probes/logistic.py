"""Logistic regression with an L2 penalty over a grid of weight decays, to convergence and in float32.

The objective is that of scikit-learn's `LogisticRegression` with C = 1 / weight_decay: the sum over examples
of the log loss, plus weight_decay / 2 times the sum of squared weights; intercepts are not penalised.
`softmax` is its multinomial form, `sigmoid` an independent binary problem for each class, for images with
several labels.

What makes a grid fast, and float32 enough:

* Features are written in their principal axes (`probes.basis`), where the diagonal of the Hessian is a good
  preconditioner: L-BFGS starts from it.
* Logits are linear along a search direction, so a line search costs no matrix product. An iteration takes
  two: for the logits of the direction, and for the gradient.
* Weight decays go from the largest to the smallest. On a logarithmic grid the solutions soon lie on a nearly
  straight line, and the next one is sought where the line through the last two leads.
* One minus a probability near one is never computed as a difference: residuals keep their relative precision
  where every training image is classified with certainty, as at small weight decays.
"""

from collections.abc import Iterable, Iterator, Sequence
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
import numpy as np

from frozen_vision.ops.arrays import Array

Loss = Literal["softmax", "sigmoid"]

_PAIRS = 10  # that L-BFGS remembers
_LINE_EVALUATIONS = 20
_SLOPE_LEFT = 0.3  # fraction of the slope at a line's start at which its search ends
TOLERANCE = 1e-5
MAX_ITERATIONS = 1000


class Fit(NamedTuple):
  """The solution for one weight decay.

  Attributes:
    weight_decay: factor of the penalty.
    weights: on coordinates; the last row holds the intercepts.
    iterations: of L-BFGS.
    error: estimate of the relative distance to the optimum in the norm of the Hessian: the last step that
      L-BFGS proposed over the weights; or what the penalty alone guarantees, if that is less.
  """

  weight_decay: float
  weights: Float[jax.Array, "r k"]
  iterations: int
  error: float


def path(
  coordinates: Float[Array, "n r"],
  truth: Bool[np.ndarray, "n k"],
  weight_decays: Iterable[float],
  *,
  loss: Loss = "softmax",
  start: Float[Array, "r k"] | None = None,
  tolerance: float = TOLERANCE,
  max_iterations: int = MAX_ITERATIONS,
) -> Iterator[Fit]:
  """Yields the solution of each weight decay, from the largest to the smallest.

  Args:
    coordinates: of the training features, `Basis.coordinates`; the last column is ones.
    truth: the classes of each example; exactly one for `softmax`.
    weight_decays: positive; equal ones are solved once.
    start: where the first search begins; zeros by default. Solutions do not depend on it.
    tolerance: of `Fit.error`.
    max_iterations: after so many, a solution is given as it is; its `error` says how good it is.

  Raises:
    ValueError: a class that no example has or, for `sigmoid`, that all have: its intercept would be infinite;
      or a weight decay that is not positive.
  """
  truth = np.asarray(truth, bool)
  decays = sorted({float(decay) for decay in weight_decays}, reverse=True)
  _check(truth, decays, loss)
  coordinates, truth = jnp.asarray(coordinates), jnp.asarray(truth)
  weights = jnp.zeros((coordinates.shape[1], truth.shape[1])) if start is None else jnp.asarray(start)
  solved: list[Fit] = []
  for decay in decays:
    begin = _extrapolated(solved, decay) if len(solved) == 2 else weights
    weights, iterations, error = _minimise(
      coordinates, truth, decay, begin, tolerance, max_iterations, loss=loss
    )
    fit = Fit(decay, weights, int(iterations), float(error))
    solved = [*solved[-1:], fit]
    yield fit


def _check(truth: np.ndarray, decays: Sequence[float], loss: Loss) -> None:
  if not decays or decays[-1] <= 0:
    raise ValueError(f"The weight decays are {list(decays)}; expected one or more positive numbers.")
  counts = truth.sum(axis=0)
  if loss == "softmax" and not np.all(truth.sum(axis=1) == 1):
    raise ValueError("An example has no class or several; softmax needs one each. Take the loss sigmoid.")
  if not counts.all():
    raise ValueError(
      f"No training example has class {int(np.argmin(counts))}; each class needs at least one."
    )
  if loss == "sigmoid" and counts.max() == len(truth):
    raise ValueError(f"All training examples have class {int(np.argmax(counts))}; each needs one without it.")


def _extrapolated(solved: Sequence[Fit], decay: float) -> jax.Array:
  """Where the line through two solutions, over the logarithm of the weight decay, leads."""
  before, last = solved
  steps = math.log(decay / last.weight_decay) / math.log(last.weight_decay / before.weight_decay)
  return last.weights + steps * (last.weights - before.weights)


class _Point(NamedTuple):
  """Weights with what was computed at them."""

  weights: jax.Array  # [r, k]
  logits: jax.Array  # [n, k]
  gradient: jax.Array  # [r, k]
  energy: jax.Array  # [1, 1] or [1, k]: <weights, Hessian weights>, without the intercepts


class _Memory(NamedTuple):
  """The last steps of L-BFGS in a ring; a pair with `inverse` 0 is none.

  Attributes:
    steps, changes: of the weights, and of the gradient along with them.
    inverse: 1 / <step, change>.
    scale: factor of the preconditioner that fits the newest pair.
    newest: place of the newest pair.
  """

  steps: jax.Array  # [pairs, r, k]
  changes: jax.Array  # [pairs, r, k]
  inverse: jax.Array  # [pairs, 1, 1] or [pairs, 1, k]
  scale: jax.Array  # [1, 1] or [1, k]
  newest: jax.Array


@functools.partial(jax.jit, static_argnames="loss")
def _minimise(coordinates, truth, decay, weights, tolerance, max_iterations, *, loss):
  """(weights, iterations, error) by L-BFGS.

  With `sigmoid` the classes are problems of their own: inner products, steps and errors are per class, and
  only the matrix products are common.
  """
  with jax.default_matmul_precision("highest"):
    axes = (0, 1) if loss == "softmax" else (0,)
    penalty = decay * jnp.ones((coordinates.shape[1], 1)).at[-1].set(0)
    tiny = jnp.finfo(jnp.float32).tiny

    def at(weights, logits):
      residual, _ = _residuals(truth, logits, loss)
      gradient = coordinates.T @ residual + penalty * weights
      energy = _bend(logits, logits - weights[-1], loss, axes) + _dot(penalty * weights, weights, axes)
      return _Point(weights, logits, gradient, energy)

    weights = _centred(weights, loss)
    point = at(weights, coordinates @ weights)
    curvature = (coordinates**2).T @ _residuals(truth, point.logits, loss)[1] + penalty
    curvature = jnp.maximum(curvature, tiny)

    def next_direction(memory, gradient):
      """(direction, estimate of the squared distance to the optimum in the norm of the Hessian)."""
      direction = -_inverse_hessian(memory, curvature, gradient, axes)
      decrease = -_dot(gradient, direction, axes)
      downhill = decrease > 0
      scaled = gradient / curvature
      direction = _centred(jnp.where(downhill, direction, -scaled), loss)
      # What the penalty alone says of the weights, with the curvature for the intercepts, is a bound.
      bound = jnp.sum(gradient * jnp.where(penalty > 0, gradient / decay, scaled), axis=axes, keepdims=True)
      return direction, jnp.where(downhill, jnp.minimum(decrease, bound), bound)

    def iterate(carry):
      point, memory, direction, _, count = carry
      along = coordinates @ direction
      length = _line_search(truth, point, direction, along, penalty, axes, loss)
      moved = at(point.weights + length * direction, point.logits + length * along)
      memory = _remember(memory, length * direction, moved.gradient - point.gradient, curvature, axes)
      direction, squared = next_direction(memory, moved.gradient)
      return moved, memory, direction, jnp.max(jnp.sqrt(squared / (moved.energy + tiny))), count + 1

    def goes_on(carry):
      *_, error, count = carry
      return (error > tolerance) & (count < max_iterations)

    one = jnp.ones((1, 1 if loss == "softmax" else weights.shape[1]))
    pairs = jnp.zeros((_PAIRS, *weights.shape))
    memory = _Memory(pairs, pairs, jnp.zeros((_PAIRS, *one.shape)), one, jnp.int32(0))
    direction, _ = next_direction(memory, point.gradient)
    begin = point, memory, direction, jnp.float32(jnp.inf), jnp.int32(0)
    point, _, _, error, count = jax.lax.while_loop(goes_on, iterate, begin)
    return point.weights, count, error


def _residuals(truth, logits, loss):
  """(derivative of the log loss by each logit, its second derivative), both precise to their last bits."""
  if loss == "sigmoid":
    wrong = jax.nn.sigmoid(jnp.where(truth, -logits, logits))
    return jnp.where(truth, -wrong, wrong), jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
  probabilities = jax.nn.softmax(logits, axis=1)
  others = jnp.sum(jnp.where(truth, 0, probabilities), axis=1, keepdims=True)
  rest = jnp.where(truth, others, 1 - probabilities)
  return jnp.where(truth, -others, probabilities), probabilities * rest


def _centred(weights, loss):
  """Weights less their mean over classes, which says nothing to softmax and is zero at the optimum."""
  return weights - jnp.mean(weights, axis=1, keepdims=True) if loss == "softmax" else weights


def _dot(a, b, axes):
  return jnp.sum(a * b, axis=axes, keepdims=True)


def _bend(logits, along, loss, axes):
  """Second derivative of the loss along a line of logits."""
  if loss == "sigmoid":
    return _dot(jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits), along**2, axes)
  probabilities = jax.nn.softmax(logits, axis=1)
  mean = jnp.sum(probabilities * along, axis=1, keepdims=True)
  return _dot(probabilities, (along - mean) ** 2, axes)


def _inverse_hessian(memory, curvature, gradient, axes):
  """The gradient times L-BFGS's inverse Hessian: the two loops of Nocedal and Wright, algorithm 7.4."""

  def backward(i, carry):
    vector, factors = carry
    at = (memory.newest - i) % _PAIRS
    factor = memory.inverse[at] * _dot(memory.steps[at], vector, axes)
    return vector - factor * memory.changes[at], factors.at[at].set(factor)

  def forward(i, vector):
    at = (memory.newest + 1 + i) % _PAIRS
    factor = memory.inverse[at] * _dot(memory.changes[at], vector, axes)
    return vector + (factors[at] - factor) * memory.steps[at]

  vector, factors = jax.lax.fori_loop(0, _PAIRS, backward, (gradient, jnp.zeros_like(memory.inverse)))
  return jax.lax.fori_loop(0, _PAIRS, forward, memory.scale * vector / curvature)


def _remember(memory, step, change, curvature, axes):
  """The memory with a pair in the place of the oldest; one without positive curvature counts for none."""
  product = _dot(step, change, axes)
  useful = product > 0
  inverse = jnp.where(useful, 1 / jnp.where(useful, product, 1), 0)
  scale = product / jnp.maximum(_dot(change, change / curvature, axes), jnp.finfo(jnp.float32).tiny)
  at = (memory.newest + 1) % _PAIRS
  return _Memory(
    memory.steps.at[at].set(step),
    memory.changes.at[at].set(change),
    memory.inverse.at[at].set(inverse),
    jnp.where(useful, scale, memory.scale),
    at,
  )


def _line_search(truth, point, direction, along, penalty, axes, loss):
  """The length of a step: Newton's method on the slope, which only grows along a line, guarded by bisection.

  The slope is enough: near the optimum, float32 cannot tell the values of the objective apart.
  """
  linear = _dot(penalty * point.weights, direction, axes)
  quadratic = _dot(penalty * direction, direction, axes)
  first = _dot(point.gradient, direction, axes)

  def slopes(length):
    logits = point.logits + length * along
    residual, _ = _residuals(truth, logits, loss)
    slope = _dot(residual, along, axes) + linear + length * quadratic
    return slope, _bend(logits, along, loss, axes) + quadratic

  def is_open(slope):
    return jnp.abs(slope) > _SLOPE_LEFT * jnp.abs(first)

  def improve(carry):
    length, low, high, (slope, bend), count = carry
    low, high = jnp.where(slope < 0, length, low), jnp.where(slope > 0, length, high)
    newton = length - slope / bend
    middle = jnp.where(jnp.isinf(high), 2 * length, (low + high) / 2)
    guarded = jnp.where((newton > low) & (newton < high), newton, middle)
    length = jnp.where(is_open(slope), guarded, length)
    return length, low, high, slopes(length), count + 1

  def goes_on(carry):
    *_, (slope, _), count = carry
    return jnp.any(is_open(slope)) & (count < _LINE_EVALUATIONS)

  one = jnp.ones_like(first)
  begin = (one, jnp.zeros_like(first), jnp.full_like(first, jnp.inf), slopes(one), jnp.int32(0))
  return jax.lax.while_loop(goes_on, improve, begin)[0]
