"""Writes what scikit-learn gives for small classification problems; needs scikit-learn, not JAX.

  python tests/references/probes.py FOLDER

FOLDER/probes.npz: scores `softmax_wide.logits` [decay, query, class] and so on, of logistic regressions on
features of more (`wide`) and of fewer (`tall`) dimensions than examples, with one label each (`softmax`) or a
binary problem for each class (`sigmoid`), at `decays`; and average precisions at eleven points, computed of
scikit-learn's precision-recall curve, for scores with many equal ones.
"""

import pathlib
import sys
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.probes import problems  # noqa: E402

DECAYS = np.logspace(-6, 5, 45)[::4]


def softmax(features, labels, queries):
  """Scores of the queries at every weight decay, each solved from the solution of the next larger one."""
  model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000, warm_start=True)
  found = []
  for decay in DECAYS[::-1]:
    model.set_params(C=1 / decay).fit(features.astype(np.float64), labels)
    found.append(model.decision_function(queries.astype(np.float64)))
  return np.stack(found[::-1])


def sigmoid(features, truth, queries):
  """As `softmax`, a problem for each class."""
  columns = []
  for labels in truth.T:
    columns.append(softmax(features, labels.astype(int), queries))
  return np.stack(columns, axis=-1)


def eleven_point(scores, truth):
  precision, recall, _ = precision_recall_curve(truth, scores)
  points = np.arange(11) / 10 - 1e-12
  with_first = np.mean([precision[recall >= point].max() for point in points])
  without = np.mean([precision[:-1][recall[:-1] >= point].max() for point in points])
  return with_first, without


def main(folder):
  warnings.simplefilter("ignore", ConvergenceWarning)
  arrays = {"decays": DECAYS}
  for shape in problems.SHAPES:
    problem = problems.make(shape)
    arrays[f"softmax_{shape}.logits"] = softmax(problem.features, problem.labels, problem.queries)
    arrays[f"sigmoid_{shape}.logits"] = sigmoid(problem.features, problem.truth, problem.queries)
  arrays["eleven_point"] = np.array([eleven_point(*ranked) for ranked in problems.rankings()])
  np.savez_compressed(pathlib.Path(folder) / "probes.npz", **arrays)


if __name__ == "__main__":
  main(sys.argv[1])
