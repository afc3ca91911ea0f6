"""The array type of pure arithmetic."""

import jax
import numpy as np

# JAX converts NumPy arrays, so whatever computes with `jax.numpy` takes both.
Array = jax.Array | np.ndarray
