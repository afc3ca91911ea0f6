import numpy as np
import pytest

from frozen_vision.visualization import instances, label_maps


def make(size=(60, 90), seed=0):
  rng = np.random.default_rng(seed)
  image = rng.integers(80, 90, (*size, 3), dtype=np.uint8)
  truth = np.zeros(size, np.uint8)
  truth[:, size[1] // 2 :] = 1
  truth[:20, :20] = 255
  prediction = truth.copy()
  prediction[truth == 255] = 0
  prediction[40:] = 2
  return label_maps.LabelComparison(image, prediction, truth, f"image {seed}")


def test_colours_are_where_their_class_is():
  example = make()
  drawn = label_maps.draw_label_map(example.image, example.truth).astype(int)
  assert drawn.shape == example.image.shape
  for label, place in ((0, (50, 10)), (1, (50, 80)), (255, (5, 5))):
    colour = np.array((46, 47, 51) if label == 255 else instances.class_color(label))
    np.testing.assert_allclose(drawn[place], example.image[place] * 0.38 + colour * 0.62, atol=1)
  enlarged = label_maps.draw_label_map(example.image, example.truth, (360, 240))
  assert enlarged.shape == (240, 360, 3)


@pytest.mark.usefixtures("without_type_checks")
def test_a_label_map_of_another_size():
  example = make()
  with pytest.raises(ValueError, match=r"label map \(60, 89\)"):
    label_maps.draw_label_map(example.image, example.truth[:, 1:])


def test_the_legend_has_the_classes_that_are_there_with_their_iou():
  example = make()
  font = instances.get_font(14)
  names = ["road", "car", "sky", "unseen"]
  texts = [text for _, _, _, text in label_maps._legend(example, names, font, 1000)]
  area = 40 * 45 - 400
  assert texts[-1] == "no label" and not any("unseen" in text for text in texts)
  assert f"road {area / (60 * 45 - 400):.2f}" in texts
  assert f"car {40 / 60:.2f}" in texts and "sky 0.00" in texts
  lines = [line for line, _, _, _ in label_maps._legend(example, names, font, 100)]
  assert lines == sorted(lines) and lines[-1] > 0
  unknown = label_maps.LabelComparison(example.image, example.prediction, None)
  texts = [text for _, _, _, text in label_maps._legend(unknown, names, font, 1000)]
  assert sorted(texts) == ["car", "road", "sky"]


def test_sheet():
  sheet = label_maps.draw_label_comparisons([make(seed=0), make(seed=1)], ["a", "b", "c"], panel_size=180)
  assert sheet.dtype == np.uint8 and sheet.shape[1] == 3 * 180 + 2 * 8 + 48
  unlabelled = make()
  unlabelled = label_maps.LabelComparison(unlabelled.image, unlabelled.prediction, None, "x")
  assert label_maps.draw_label_comparisons([unlabelled], "abc", panel_size=180).shape[1] == 2 * 180 + 8 + 48
  with pytest.raises(ValueError, match="no example"):
    label_maps.draw_label_comparisons([], ["a"])
