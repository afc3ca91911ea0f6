"""Random weights are the same bits everywhere, and have the size that weights have."""

from flax import nnx
import jax
import numpy as np
import pytest

from frozen_vision.backbones import families, random_weights
from frozen_vision.files import trees

_BITS = [1015559802, 958519236, 3167858900, 975105752, 1022393489, 995608421]
_SMALL = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))


def test_the_bits_never_change():
  drawn = random_weights.draw("stages/0/blocks/0/attn/qkv/kernel", (2, 3), 0.02, seed=0)
  assert drawn.dtype == np.float32
  assert drawn.view(np.uint32).reshape(-1).tolist() == _BITS
  others = [random_weights.draw(path, (2, 3), 0.02, seed) for path, seed in (("a", 0), ("b", 0), ("a", 1))]
  assert len({array.tobytes() for array in [drawn, *others]}) == 4


def test_they_are_nearly_normal():
  drawn = random_weights.draw("kernel", (300, 400), 0.02, seed=3)
  assert abs(drawn.mean()) < 3e-4 and abs(drawn.std() / 0.02 - 1) < 0.01
  assert np.abs(drawn).max() < 0.07 and abs(np.mean(drawn**4) / np.mean(drawn**2) ** 2 - 2.7) < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_only_what_was_drawn_is_drawn_anew(seed):
  old = families.build_backbone("swinv2_nano", rngs=nnx.Rngs(seed), **_SMALL)
  before = {path: np.asarray(leaf) for path, leaf in trees.flatten(nnx.state(old, nnx.Param)).items()}
  after = trees.flatten(nnx.state(random_weights.redraw(old, seed), nnx.Param))
  assert before.keys() == after.keys()
  changed = 0
  for path, leaf in after.items():
    leaf = np.asarray(leaf)
    if np.ptp(before[path]):
      assert not np.array_equal(leaf, before[path]) and 0.7 < leaf.std() / before[path].std() < 1.4, path
      changed += 1
    else:
      np.testing.assert_array_equal(leaf, before[path])
  assert changed > 8


def test_last_bits_of_the_initialiser_do_not_matter():
  old = families.build_backbone("swinv2_nano", rngs=nnx.Rngs(0), **_SMALL)
  graphdef, params, rest = nnx.split(old, nnx.Param, ...)
  nudged = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), params)
  first, second = (
    trees.flatten(nnx.state(random_weights.redraw(nnx.merge(graphdef, state, rest), 0), nnx.Param))
    for state in (params, nudged)
  )
  drawn = [path for path, leaf in trees.flatten(params).items() if np.ptp(np.asarray(leaf))]
  assert drawn and all(np.array_equal(first[path], second[path]) for path in drawn)
