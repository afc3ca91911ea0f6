"""Feature keys of old checkpoints are compared with those of today."""

from frozen_vision.backbones import families
from frozen_vision.freezing import feature_key


def test_a_key_of_the_first_edition_is_the_one_of_today():
  backbone = families.abstract_backbone("swinv2_nano", depths=(1, 1, 1, 1))
  old = {
    "weights": "abc",
    "window_sizes": [8, 8, 8, 8],
    "pretrained_window_sizes": [0, 0, 0, 0],
    "strides": [4, 8, 16, 32],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "padding": "bottom-right zeros, then shift",
    "dtype": "float32",
    "held_as": "bfloat16",
  }
  assert feature_key.current(old) == feature_key.feature_key(backbone, "abc", storage="bfloat16")
  assert feature_key.current(old | {"held_as": "int8"}) != feature_key.current(old)
  today = feature_key.feature_key(backbone, "abc", storage="bfloat16", folded=False)
  assert today["storage"] == "bfloat16, unfolded" and feature_key.current(today) == today
  assert feature_key.current(None) is None
