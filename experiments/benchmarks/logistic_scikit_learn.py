"""The grid by scikit-learn, for `logistic.py`: prints seconds and scores as JSON; needs no JAX.

python logistic_scikit_learn.py FILE.npz defaults|converged
"""

import json
import sys
import time
import warnings

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression


def main(file: str, kind: str) -> None:
  """Fits all weight decays, each from the solution before; `converged` from the largest to the smallest."""
  warnings.simplefilter("ignore", ConvergenceWarning)
  with np.load(file) as arrays:
    data = dict(arrays)
  features, labels = data["features"].astype(np.float64), data["labels"]
  parts = [(data[f"{part}_features"].astype(np.float64), data[f"{part}_labels"]) for part in ("held", "test")]
  model = LogisticRegression(warm_start=True)
  order = np.argsort(data["decays"])
  if kind == "converged":
    model.set_params(tol=1e-14, max_iter=2000)
    order = order[::-1]
  rows, started = [], time.perf_counter()
  for index in map(int, order):
    model.set_params(C=1 / data["decays"][index]).fit(features, labels)
    rows.append([index, *(model.score(*part) for part in parts), int(np.max(model.n_iter_))])
  seconds = time.perf_counter() - started
  print(json.dumps({"seconds": seconds, "rows": sorted(rows), "version": sklearn.__version__}))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2])
