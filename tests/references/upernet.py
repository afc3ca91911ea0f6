"""Writes outputs of transformers' UPerNet heads; needs transformers and PyTorch, not JAX.

  python tests/references/upernet.py FOLDER [SEED]

`upernet.npz` holds the logits of the head and of the auxiliary head, `upernet.json` how weights and features
are generated from their names (tests/golden_values.py). Batch norms are replaced by group norms, which is the
one difference to ours.
"""

import json
import pathlib
import sys
import types
import zlib

import numpy as np
import torch
from torch import nn

try:
  import torchvision  # noqa: F401
except RuntimeError:  # a torchvision without its compiled operators, which UPerNet does not need
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]

from transformers.models.upernet import modeling_upernet

CHANNELS, STRIDES, IMAGE = (8, 12, 16, 24), (4, 8, 16, 32), (64, 160)
GROUPS = 4
CONFIG = types.SimpleNamespace(
  pool_scales=(1, 2, 3, 6),
  hidden_size=16,
  num_labels=5,
  auxiliary_in_channels=None,
  auxiliary_channels=8,
  auxiliary_num_convs=1,
  auxiliary_concat_input=False,
)


def values(seed, name, shape, scale=1.0, offset=0.0):
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  return (rng.standard_normal(shape) * scale).astype(np.float32) + np.float32(offset)


def _with_group_norms(module):
  for name, child in module.named_children():
    if isinstance(child, nn.BatchNorm2d):
      setattr(module, name, nn.GroupNorm(GROUPS, child.num_features, eps=child.eps))
    else:
      _with_group_norms(child)


def main(folder, seed):
  heads = nn.ModuleDict(
    {
      "decode_head": modeling_upernet.UperNetHead(CONFIG, list(CHANNELS)),
      "auxiliary_head": modeling_upernet.UperNetFCNHead(CONFIG, list(CHANNELS), in_index=2),
    }
  )
  # The modules of the pyramid pooling are also kept in plain lists, which is what its forward uses.
  _with_group_norms(heads)
  spec = {}
  for name, tensor in heads.state_dict().items():
    is_norm_scale = "batch_norm.weight" in name
    scale = 0.1 if tensor.ndim < 2 else float(np.prod(tensor.shape[1:])) ** -0.5
    spec[name] = dict(shape=list(tensor.shape), scale=scale, offset=1.0 if is_norm_scale else 0.0)
  heads.load_state_dict(
    {
      name: torch.from_numpy(values(seed, name, **{k: entry[k] for k in ("shape", "scale", "offset")}))
      for name, entry in spec.items()
    }
  )
  features = [
    torch.from_numpy(values(seed, f"features.{i}", (2, c, IMAGE[0] // s, IMAGE[1] // s)))
    for i, (c, s) in enumerate(zip(CHANNELS, STRIDES))
  ]
  with torch.no_grad():
    outputs = {name: head(features).numpy() for name, head in heads.items()}
  folder = pathlib.Path(folder)
  np.savez_compressed(folder / "upernet.npz", **outputs)
  description = dict(
    seed=seed,
    channels=CHANNELS,
    strides=STRIDES,
    image=IMAGE,
    groups=GROUPS,
    pool_scales=CONFIG.pool_scales,
    hidden_size=CONFIG.hidden_size,
    num_labels=CONFIG.num_labels,
    auxiliary_channels=CONFIG.auxiliary_channels,
    state_dict=spec,
  )
  (folder / "upernet.json").write_text(json.dumps(description, indent=1))


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
