"""`python -m frozen_vision.diagnose`: tables and pictures of small backbones, and its errors."""

import json

from flax import nnx
import numpy as np
from PIL import Image
import pytest

from frozen_vision import diagnose
from frozen_vision.backbones import families
from tests import tiny_family
from tests.diagnostics import test_attention


def test_tables_and_pictures(tmp_path):
  swin = families.build_backbone("swinv2_t", rngs=nnx.Rngs(0), **test_attention._SWIN)
  vit = families.build_backbone(
    "deit_vits16", rngs=nnx.Rngs(0), embed_dim=32, depth=2, num_heads=2, mlp_dim=32
  )
  tiny = tiny_family.Tiny(tiny_family.TinyConfig(), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  for number in range(9):
    side = 40 + number
    Image.fromarray(rng.integers(0, 256, (side, 48, 3), np.uint8)).save(tmp_path / f"{number}.png")
  images = diagnose.read_images(tmp_path, 32, 100)
  assert images.shape == (9, 32, 32, 3)
  report = diagnose.diagnose({"swin": swin, "vit": vit, "tiny": tiny}, images, tmp_path / "out")
  assert report == json.loads((tmp_path / "out" / "diagnostics.json").read_text()) | dict(side=(32, 32))
  assert report["images"] == 8 and len(report["attention"]["swin"]) == 8
  assert "no self-attention" in report["attention"]["tiny"]
  own = {pair["first"]: np.diag(pair["values"]) for pair in report["cka"] if pair["first"] == pair["second"]}
  for name in ("swin", "vit", "tiny"):
    np.testing.assert_allclose(own[name], 1, atol=1e-3)
  assert len(report["cka"]) == 6
  for name in ("attention.png", "cka.png"):
    with Image.open(tmp_path / "out" / name) as picture:
      assert min(picture.size) > 300
  assert "| vit | 1 | " in (tmp_path / "out" / "diagnostics.md").read_text()


def test_diffusion_and_reconstruction(tmp_path):
  tiny = tiny_family.Tiny(tiny_family.TinyConfig(channels=(4, 6)), rngs=nnx.Rngs(0))
  images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
  slow = diagnose.SlowOptions(images=2, occluder=8, stride=8, steps=2)
  measures = ("diffusion", "reconstruction")
  report = diagnose.diagnose({"tiny": tiny}, images, tmp_path, measures=measures, slow=slow)
  assert report == json.loads((tmp_path / "diagnostics.json").read_text()) | dict(side=(32, 32))
  assert "attention" not in report and "cka" not in report
  assert len(report["diffusion"]["tiny"]) == 2 and all(0 < each < 1 for each in report["diffusion"]["tiny"])
  first, second = report["reconstruction"]["tiny"]
  assert first["distance"] != second["distance"] and len(first["colour_errors"]) == 3
  page = (tmp_path / "diagnostics.md").read_text()
  assert "on 2 images, by a square of 8 px" in page and "from the last feature map in 2 steps" in page
  assert sorted(path.name for path in tmp_path.glob("*.png")) == ["diffusion.png", "reconstruction.png"]
  with Image.open(tmp_path / "diffusion.png") as picture:
    assert min(picture.size) > 300
  with pytest.raises(ValueError, match="'depth' is no measure; known: attention, cka"):
    diagnose.diagnose({"tiny": tiny}, images, tmp_path, measures=["depth"])


def test_errors_are_one_sentence(tmp_path, capsys):
  command = ["--backbones=swinv2_nano", f"--out={tmp_path / 'out'}", f"--images={tmp_path}"]
  assert diagnose.main(command) == 1
  assert "0 images; expected at least 4" in capsys.readouterr().err
  assert diagnose.main(["--backbones=swinv2_x", f"--out={tmp_path / 'out'}"]) == 1
  assert "swinv2_x" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
