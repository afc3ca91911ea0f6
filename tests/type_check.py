"""The type checker that `tests/conftest.py` puts around the package's functions."""

from typing import Any, Self

import beartype
import numpy as np

# An int is a float to annotations, as it is to static type checkers (PEP 484), and NumPy's scalars, which its
# arrays give, are numbers. `Self` needs a decorated class; jaxtyping decorates functions alone.
_OVERRIDES = beartype.FrozenDict(
  {
    bool: bool | np.bool_,
    int: int | np.integer,
    float: float | int | np.floating | np.integer,
    Self: Any,
  }
)

check = beartype.beartype(conf=beartype.BeartypeConf(hint_overrides=_OVERRIDES))
