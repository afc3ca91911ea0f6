"""The mmdet converter. Numbers of HTC: tests/heads/htc/test_golden.py; here, what HTC has not."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from frozen_vision import convert as convert_cli
from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.files import trees
from frozen_vision.heads import files as head_weights
from frozen_vision.heads.htc import checkpoints, htc
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.necks.build import build_neck
from tests.files import pth_file

SPECS = tuple(FeatureSpec(4 * 2**i, 3 + i) for i in range(4))
CHANNELS = 8
SMALL = dict(num_classes=3, rpn_channels=8, fc_channels=6, mask_channels=8, mask_convs=2)


class Detector(nnx.Module):
  """The parts that the converter fills, and a part that it must leave alone."""

  def __init__(self, config, name="fpn", **neck):
    self.backbone = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    self.neck = build_neck(name, SPECS, channels=CHANNELS, rngs=nnx.Rngs(0), **neck)
    self.head = htc.HTC(self.neck.feature_specs, config, rngs=nnx.Rngs(0))


def _detector(preset=htc_config.mask_rcnn, *, input_norm=False, **options):
  return nnx.eval_shape(lambda: Detector(preset(**(SMALL | options)), input_norm=input_norm))


def _state_dict(stages=None, *, boxes=1, flow=False, convs=0, norms=False, semantic=0, backbone_norms=False):
  """An mmdet state dict of random numbers, named from mmdet's sources and not from our table."""
  rng = np.random.default_rng(0)
  found = {}

  def layer(name, *shape, bias=True):
    found[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
    if bias:
      found[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)

  layer("backbone.layer1.0.conv1", 4, 4, 1, 1, bias=False)
  for i, spec in enumerate(SPECS):
    if backbone_norms:
      layer(f"backbone.norm{i}", spec.channels)
    layer(f"neck.lateral_convs.{i}.conv", 8, spec.channels, 1, 1)
    layer(f"neck.fpn_convs.{i}.conv", 8, 8, 3, 3)
  layer("rpn_head.rpn_conv", 8, 8, 3, 3)
  layer("rpn_head.rpn_cls", 3, 8, 1, 1)
  layer("rpn_head.rpn_reg", 12, 8, 1, 1)
  for stage in [""] if stages is None else [f".{i}" for i in range(stages)]:
    box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
    size = 8
    for i in range(convs):
      layer(f"{box}.shared_convs.{i}.conv", 32, size, 3, 3, bias=not norms)
      if norms:
        layer(f"{box}.shared_convs.{i}.gn", 32)
      size = 32
    layer(f"{box}.shared_fcs.0", 6, size * 49)
    if not convs:
      layer(f"{box}.shared_fcs.1", 6, 6)
    layer(f"{box}.fc_cls", 4, 6)
    layer(f"{box}.fc_reg", 4 * boxes, 6)
    for i in range(2):
      layer(f"{mask}.convs.{i}.conv", 8, 8, 3, 3)
    if flow and stage != ".0":
      layer(f"{mask}.conv_res.conv", 8, 8, 1, 1)
    layer(f"{mask}.upsample", 8, 8, 2, 2)
    layer(f"{mask}.conv_logits", 3, 8, 1, 1)
  if semantic:
    for i in range(5):
      layer(f"roi_head.semantic_head.lateral_convs.{i}.conv", 8, 8, 1, 1)
    layer("roi_head.semantic_head.convs.0.conv", 8, 8, 3, 3)
    layer("roi_head.semantic_head.conv_embedding.conv", 8, 8, 1, 1)
    layer("roi_head.semantic_head.conv_logits", semantic, 8, 1, 1)
  return found


def _convert(source, detector, **options):
  graphdef, state = nnx.split(detector)
  return nnx.merge(graphdef, checkpoints.convert(source, state, **options))


CASES = {
  "mask_rcnn": (dict(boxes=3), htc_config.mask_rcnn, {}),
  "mask_rcnn of Swin": (
    dict(boxes=3, backbone_norms=True),
    htc_config.mask_rcnn,
    dict(input_norm=True),
  ),
  "cascade, 4 convolutions": (
    dict(stages=3, convs=4),
    htc_config.cascade_mask_rcnn,
    dict(num_box_convs=4, box_conv_channels=32, num_fcs=1),
  ),
  "htc with everything": (
    dict(stages=3, flow=True, convs=1, norms=True, semantic=5),
    htc_config.htc,
    dict(
      num_box_convs=1,
      box_conv_channels=32,
      box_conv_norm="group",
      num_fcs=1,
      semantic_classes=5,
      semantic_channels=8,
      semantic_convs=1,
    ),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_the_source_arrives_once(case):
  theirs, preset, ours = CASES[case]
  source = _state_dict(**theirs)
  found = _convert(source, _detector(preset, **ours))
  leaves = jax.tree.leaves((nnx.state(found.neck), nnx.state(found.head)))
  numbers = np.sort(np.concatenate([np.ravel(x) for x in leaves]))
  used = [x for name, x in source.items() if not name.startswith("backbone.layer")]
  expected = np.sort(np.concatenate([np.ravel(x) for x in used]))
  np.testing.assert_array_equal(numbers, expected)
  for leaf in jax.tree.leaves(nnx.state(found.backbone)):
    assert isinstance(leaf, jax.ShapeDtypeStruct)


def _mmdet_box_head(source, x):
  """Forward pass of mmdet's ConvFCBBoxHead in NumPy: x [n, c, 7, 7] -> class logits, deltas."""

  def w(name):
    return source[f"roi_head.bbox_head.{name}"].astype(float)

  conv = w("shared_convs.0.conv.weight")
  padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
  x = sum(
    np.einsum("nchw,oc->nohw", padded[:, :, i : i + 7, j : j + 7], conv[:, :, i, j])
    for i, j in np.ndindex(3, 3)
  )
  groups = x.reshape(len(x), 32, -1)
  groups = groups - groups.mean(-1, keepdims=True)
  x = (groups / np.sqrt(np.square(groups).mean(-1, keepdims=True) + 1e-5)).reshape(x.shape)
  scale, shift = w("shared_convs.0.gn.weight"), w("shared_convs.0.gn.bias")
  x = np.maximum(x * scale[:, None, None] + shift[:, None, None], 0)
  x = x.reshape(len(x), -1) @ w("shared_fcs.0.weight").T + w("shared_fcs.0.bias")
  x = np.maximum(x, 0)
  return (x @ w(f"{n}.weight").T + w(f"{n}.bias") for n in ("fc_cls", "fc_reg"))


def test_box_head_with_convolutions_and_boxes_per_class_computes_the_same():
  source = _state_dict(boxes=3, convs=1, norms=True)
  detector = _convert(
    source,
    _detector(num_box_convs=1, box_conv_channels=32, box_conv_norm="group", num_fcs=1),
  )
  x = np.random.default_rng(1).standard_normal((2, 3, 7, 7, CHANNELS)).astype(np.float32)
  output = jax.jit(detector.head.box_heads[0].__call__)(x)
  logits, deltas = _mmdet_box_head(source, np.moveaxis(x.reshape(6, 7, 7, -1), -1, 1))
  for ours, theirs in (
    (output.logits.reshape(6, 4), logits),
    (output.deltas.reshape(6, 12), deltas),  # four deltas of class 0, then of class 1, ...
  ):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_one_error_lists_everything_that_is_wrong():
  source = _state_dict(boxes=1)  # one box for all classes, where ours has one per class
  source["neck.fpn_convs.4.conv.weight"] = np.zeros((8, 8, 3, 3), np.float32)
  source["roi_head.bbox_head.shared_convs.0.bn.running_mean"] = np.zeros(8, np.float32)
  source["roi_head.mask_head.0.conv_logits.bias"] = np.zeros(3, np.float32)  # again
  source["backbone.norm0.weight"] = np.zeros(3, np.float32)
  source["neck.lateral_convs.0.conv.weight"] = np.zeros((8, 3, 3, 3), np.float32)
  del source["rpn_head.rpn_cls.bias"]
  with pytest.raises(ValueError) as error:
    _convert(source, _detector())
  text = str(error.value)
  for line in (
    r"8 keys at fault:\n  missing head/rpn/objectness/bias \(3,\)",
    r"unexpected neck.fpn_convs.4.conv.weight \(8, 8, 3, 3\)",
    r"unexpected .*shared_convs.0.bn.running_mean \(8,\)",
    r"unexpected roi_head.mask_head.0.conv_logits.bias \(3,\)",
    r"unexpected backbone.norm0.weight \(3,\)",
    r"bbox_head.fc_reg.weight is \(4, 6\), expected one for head/box_heads/0/boxes/kernel \(6, 12\)",
    r"bbox_head.fc_reg.bias is \(4,\), expected one for head/box_heads/0/boxes/bias \(12,\)",
    r"lateral_convs.0.conv.weight is \(8, 3, 3, 3\), expected one for neck/laterals/0/kernel \(3, 8\)",
  ):
    assert re.search(line, text), (line, text)


def test_missing_norms_name_the_option():
  with pytest.raises(ValueError, match="input_norm=False"):
    _convert(_state_dict(boxes=3), _detector(input_norm=True))


def test_other_modules_are_refused():
  def build_bifpn():
    return Detector(htc_config.mask_rcnn(**SMALL), name="bifpn", norm="none")

  for module in (build_bifpn, lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))):
    with pytest.raises(ValueError, match=r"need a detector with parts `neck` \(an FPN\)"):
      checkpoints.convert(_state_dict(), nnx.state(nnx.eval_shape(module)))


def test_kept_parameters_stay():
  """A head for other classes starts from everything but the class layers."""
  source = _state_dict(boxes=3)
  keep = (r"head/box_heads/.*/(classes|boxes)/.*", r"head/mask_heads/.*/logits/.*")
  _, state = nnx.split(_detector(num_classes=7))
  flat = nnx.to_flat_state(checkpoints.convert(source, state, keep=keep))
  found = {trees.path_string(path): leaf.get_value() for path, leaf in flat}
  untouched = {path for path, x in found.items() if isinstance(x, jax.ShapeDtypeStruct)}
  kinds = ("box_heads/0/classes", "box_heads/0/boxes", "mask_heads/0/logits")
  assert untouched == {"backbone/kernel", "backbone/bias"} | {
    f"head/{kind}/{leaf}" for kind in kinds for leaf in ("kernel", "bias")
  }
  np.testing.assert_array_equal(
    found["head/box_heads/0/fcs/1/kernel"], source["roi_head.bbox_head.shared_fcs.1.weight"].T
  )


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_writes_what_a_detector_may_start_from(case, tmp_path, capsys):
  """Without knowing the detector, it writes the very numbers that the conversion for it gives."""
  theirs, preset, ours = CASES[case]
  source = _state_dict(**theirs)
  path = pth_file.write(tmp_path / "source.pth", {"state_dict": source})
  convert_cli.main(["--head-of=mmdet", str(path), str(tmp_path / "head.safetensors")])
  printed = capsys.readouterr().out
  assert "1 keys are not for them:\n  backbone.layer1.0.conv1.weight\n" in printed
  state = nnx.state(_detector(preset, **ours))
  found = trees.flatten(head_weights.load(state, tmp_path / "head.safetensors"))
  wanted = trees.flatten(checkpoints.convert(source, state))
  for name in wanted:
    if name.startswith("backbone/"):
      assert isinstance(found[name], jax.ShapeDtypeStruct)
    else:
      np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_the_command_line_refuses_what_it_cannot_place(tmp_path, capsys):
  source = _state_dict() | {
    "rpn_head.extra.weight": np.zeros(2, np.float32),
    "roi_head.bbox_head.shared_fcs.0.weight": np.zeros((6, 8 * 49 + 1), np.float32),
  }
  path = tmp_path / "source.safetensors"
  safetensors.numpy.save_file(source, path)
  target = tmp_path / "head.safetensors"
  with pytest.raises(SystemExit) as error:
    convert_cli.main(["--head-of=mmdet", str(path), str(target)])
  text = str(error.value)
  assert "rpn_head.extra.weight (2,)" in text and "shared_fcs.0.weight is (6, 393)" in text
  assert not target.exists()
  with pytest.raises(SystemExit):
    convert_cli.main(["--head-of=mmdet", "--window=8", str(path), str(target)])
  assert "--head-of takes no --window" in capsys.readouterr().err


def test_dtype_of_the_state_is_kept():
  source = {k: v.astype(np.float16) for k, v in _state_dict(boxes=3).items()}
  found = _convert(source, _detector())
  assert {x.dtype for x in jax.tree.leaves(nnx.state(found.head))} == {jnp.dtype("float32")}


def test_reading_files(tmp_path):
  source = _state_dict(boxes=3)
  path = tmp_path / "head.safetensors"
  safetensors.numpy.save_file(source, path)
  found = checkpoints.read_state_dict(path)
  assert set(found) == set(source)
  zipped = pth_file.write(tmp_path / "head.pth", {"meta": {"epoch": 12}, "state_dict": source})
  assert set(checkpoints.read_state_dict(zipped)) == set(source)
  name = "rpn_head.rpn_conv.weight"
  for file in (path, zipped):
    np.testing.assert_array_equal(checkpoints.read_state_dict(file)[name], source[name])
  with pytest.raises(FileNotFoundError, match="nothing.pth does not exist"):
    checkpoints.read_state_dict(tmp_path / "nothing.pth")
  for name_of_file, message in (
    ("head.npz", "head.npz is not a complete .npz file"),
    ("head.bin", "head.bin cannot be read as a .pth file"),
  ):
    (tmp_path / name_of_file).write_bytes(b"1")
    with pytest.raises(ValueError, match=message):
      checkpoints.read_state_dict(tmp_path / name_of_file)
  old = pth_file.write_legacy(tmp_path / "old.pth", {"meta": {"epoch": 12}, "state_dict": source})
  found = checkpoints.read_state_dict(old)
  assert set(found) == set(source)
  np.testing.assert_array_equal(found[name], source[name])
