"""CONTRIBUTING.md is true: its paths exist, what it names is there, and its example of a head works."""

import pathlib
import re
import textwrap

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import frozen_vision as fv
from frozen_vision.tasks import base, segmentation, segmentation_options
from frozen_vision.training import loop
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TEXT = (_ROOT / "CONTRIBUTING.md").read_text()


def test_every_path_exists():
  pattern = r"`((?:frozen_vision|configs|experiments|tests|docs|\.ci)/[^`\s*]*|README\.md)`"
  paths = set(re.findall(pattern, _TEXT))
  assert len(paths) > 30
  assert not sorted(path for path in paths if not (_ROOT / path).exists())


def test_what_it_says_of_a_file_is_in_it():
  rows = re.findall(r"^\| `(frozen_vision/[\w/]+\.py)` \| (.*) \|$", _TEXT, re.MULTILINE)
  for path, text in rows:
    for name in re.findall(r"`(\w+)`", text):
      assert re.search(rf"\b{name}\b", (_ROOT / path).read_text()), (path, name)
  assert len(rows) > 5
  for name in (
    *base.Task.__abstractmethods__ - {"__init__"},
    *("prepare", "to_source", "build_teacher", "initial_state", "phases", "phase_at", "nominal_classes"),
  ):
    assert f"`{name}" in _TEXT, name
  for name in re.findall(r"^   \* `(\w+)", _TEXT, re.MULTILINE):
    assert hasattr(base.Task, name) or name in base.Task.__annotations__, name


def test_every_campaign_has_its_short_form():
  rows = dict(re.findall(r"^\| `(\w+\.py)` \| (.*) \|$", _TEXT, re.MULTILINE))
  campaigns = {path.name for path in (_ROOT / "experiments" / "reliability").glob("*.py")}
  assert rows.keys() == campaigns - {"campaign.py"}
  for text in rows.values():
    for path, test in re.findall(r"`(tests/[\w/]+\.py)`(?:: `(\w+)`)?", text):
      assert f"def {test or 'test_'}" in (_ROOT / path).read_text(), (path, test)


def _example():
  """The names that the example defines."""
  blocks = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
  assert len(blocks) == 1
  names = {"__name__": "example"}
  exec(textwrap.dedent(blocks[0]), names)
  return names


def test_the_example_is_a_head_of_segmentation():
  names = _example()
  specs = (fv.FeatureSpec(4, 8), fv.FeatureSpec(8, 16))
  head = names["FinestHead"](specs, names["FinestConfig"](num_classes=5), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  features = [
    jnp.asarray(rng.standard_normal((2, 32 // s.stride, 32 // s.stride, s.channels)), "float32")
    for s in specs
  ]
  batch = {"labels": jnp.asarray(rng.integers(0, 5, (2, 32, 32)))}
  losses, _ = head.losses(features, batch, jax.random.key(0))
  # Against optax on logits that jax.image brings to the labels' size.
  full = jax.image.resize(head(features), (2, 32, 32, 5), "linear")
  expected = optax.softmax_cross_entropy_with_integer_labels(full, batch["labels"]).mean()
  np.testing.assert_allclose(losses["loss_ce"], expected, rtol=1e-5)
  assert head.predict_semantic(features, (32, 32)).shape == (2, 32, 32, 5)


def test_the_example_trains_once_the_two_tables_name_it(monkeypatch, tmp_path):
  names = _example()
  monkeypatch.setitem(segmentation_options.HEADS, "finest", names["FinestConfig"])
  monkeypatch.setitem(segmentation.HEADS, "finest", names["FinestHead"])
  config = tiny.segmentation("finest")
  config.segmentation.head.dropout = 0.5
  config.update(dict(steps=2, log_every=1))
  metrics = loop.train(config, tmp_path)
  assert 0 <= metrics["mIoU"] <= 1
  series = tiny.metrics(tmp_path)
  first, last = (value for _, value in series["train/loss"])
  assert np.isfinite([first, last]).all() and first != last
  assert {"train/loss/loss_ce", "train/pixel_accuracy"} < set(series)
