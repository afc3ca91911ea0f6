"""ViTs of every family against timm and transformers themselves, on checkpoints that these wrote.

They run in this interpreter if it has them, or in $FROZEN_VISION_REFERENCE_PYTHON; otherwise these tests are
skipped, and those of golden outputs and of files in each layout remain.
"""

import json

import jax
import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.backbones.vit import checkpoints, positions
from frozen_vision.backbones.vit import model as vit
from tests import reference_scripts

pytestmark = pytest.mark.slow

_PACKAGES = ("torch", "torchvision", "timm", "transformers")
_CASES = [
  *(
    f"timm-{case}"
    for case in (
      *("deit", "augreg", "dino8", "mae14", "dinov2", "dinov2_reg4", "dinov2_g", "dinov3", "dinov3_qkvb"),
      *("dinov3_plus", "clip", "openclip", "siglip", "siglip2"),
    )
  ),
  *(
    f"transformers-{case}"
    for case in ("deit", "dinov2", "dinov2_reg4", "dinov2_g", "dinov3", "dinov3_7b", "clip", "siglip2")
  ),
]
_FULL_CASES = [
  *(f"timm-full_{case}" for case in ("dinov2", "dinov2_reg4", "dinov3", "dinov3_plus", "clip")),
  "transformers-full_siglip2",
]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
  folder = tmp_path_factory.mktemp("references")
  return reference_scripts.run("vit.py", folder, packages=_PACKAGES)


@pytest.mark.parametrize("case", _CASES)
def test_every_block_at_three_sizes(references, case):
  spec = json.loads((references / f"{case}.json").read_text())
  wanted = np.load(references / f"{case}.npz")
  options = spec["overrides"] | dict(taps=list(range(spec["overrides"]["depth"])), norm_taps=False)
  checkpoint = checkpoints.open_checkpoint(references / f"{case}.pth", spec["row"], **options)
  # What the library itself saves, in shards where it is transformers, has the same weights.
  saved = checkpoints.open_checkpoint(references / case, spec["row"], **options)
  assert saved.config == checkpoint.config and set(saved.leaves) == set(checkpoint.leaves)
  for path, leaf in checkpoint.leaves.items():
    np.testing.assert_array_equal(leaf.read(), saved.leaves[path].read())
  backbone = _load(checkpoint)
  for index in range(spec["sizes"]):
    _compare(backbone, wanted, index)


@pytest.mark.parametrize("case", _FULL_CASES)
def test_full_sizes(references, case):
  spec = json.loads((references / f"{case}.json").read_text())
  depth = checkpoints.VARIANTS[spec["row"]].depth
  options = spec["overrides"] | dict(taps=tuple(range(depth)), norm_taps=False)
  path = references / f"{case}.safetensors"
  _compare(
    _load(checkpoints.open_checkpoint(path, spec["row"], **options)), np.load(references / f"{case}.npz"), 0
  )


def test_parameter_counts_of_full_sizes(references):
  for row, count in json.loads((references / "counts.json").read_text()).items():
    config = checkpoints.VARIANTS[row]
    shapes = checkpoints.variable_shapes(config)
    found = sum(int(np.prod(shape, dtype=np.int64)) for path, shape in shapes.items() if path != "periods")
    assert found == count, row


def test_positions_of_mae(references):
  wanted = np.load(references / "sine.npz")["table"]
  np.testing.assert_array_equal(wanted[0], 0)
  np.testing.assert_allclose(positions.sine_table(5, 48), wanted[1:], rtol=0, atol=2e-7)


def _load(checkpoint):
  module = base.abstract(vit.ViT, checkpoint.config)
  return families.BackboneFile(module, checkpoint.leaves, checkpoint.path, None).load()


def _compare(backbone, wanted, index):
  images = wanted[f"{index}.images"]
  run = jax.jit(lambda module, x: (module(x), module.token_sequence(x), module.embed(x)))
  maps, tokens, pooled = run(backbone, images)
  prefix = backbone.config.prefix_tokens
  found = {f"block{number}": map_ for number, map_ in enumerate(maps)}
  found |= dict(tokens=tokens, embed=pooled)
  for name, value in found.items():
    reference = wanted[f"{index}.{name}"]
    if name.startswith("block"):
      reference = reference[:, prefix:].reshape(value.shape)
    assert value.shape == reference.shape, name
    assert np.abs(value - reference).max() <= 1e-5 * np.abs(reference).max(), (index, name)
