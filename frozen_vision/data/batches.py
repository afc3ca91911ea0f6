"""Every key of every task's batch, with shape, dtype and unit: what transforms return and tasks take.

A transform returns one example; the pipeline stacks `b` of them into a batch, so every shape here begins with
`*b`: nothing for an example, one axis for a batch. Arrays are numpy's on the host and jax's in the compiled
step. Keys with 64-bit values (`index`, `image_id`) stay on the host, where they are exact.

Conventions, for all tasks:

* Images are RGB, uint8, 0..255, neither normalised nor scaled: a backbone does that by its own statistics.
* A frame is the fixed size [H, W] of an example. An image lies at its top left; the rest is padding: zeros in
  images, `label_maps.IGNORE` (255) in label maps.
* Sizes are (height, width) in pixels. Boxes are xyxy, that is left, top, right, bottom, in pixels of the
  frame, where the pixel in row i and column j covers [j, j + 1) x [i, i + 1).
* Lists of variable length are padded to a fixed number of rows, with a mask that says which rows are valid;
  other rows are zeros.
* Testing at several scales adds `image.i` and `image_size.i` of every further scale i = 1, 2, ..., each
  resized from the source image into a frame of its own.

`mismatches` compares an example or a batch with the type that describes it.
"""

from collections.abc import Mapping
import re
from typing import Any, get_args, get_type_hints, NotRequired, Required, TypedDict

import jax
from jaxtyping import Bool, Float32, Int32, Int64, jaxtyped, UInt8
import numpy as np

Array = np.ndarray | jax.Array

# Keys of further scales; see the module.
_SCALES = re.compile(r"(image|image_size)\.[1-9][0-9]*")


class Batch(TypedDict, total=False):
  """Keys that the pipeline adds to every example.

  Attributes:
    index: of training, the number of the example in the run, from 0, over all passes and processes; of
      evaluation, the position of the record in its source.
    example_valid: of evaluation only: False where the last record is repeated to fill up the last batch.
  """

  index: Int64[Array, "*b"]
  example_valid: Bool[Array, "*b"]


class DetectionTrainBatch(Batch):
  """Objects to train on, from `detection.transforms.DetectionTrain`; n is `detection.max_objects`.

  Attributes:
    image: the frame.
    image_size: (height, width) of the image's content in the frame, in pixels.
    boxes: of the objects, xyxy in pixels of the frame, inside the content.
    labels: class indices.
    valid: which rows are objects.
    masks: of the objects at the frame's size, 8 pixels of a row in a byte, the leftmost in the highest bit
      (`numpy.packbits` along the width); absent where only boxes are trained.
    semantic: class index of every s-th pixel of every s-th row, s the stride of the level that the semantic
      branch works on, 255 without a class; absent without such a branch.
    negative: classes that the image is known not to show (LVIS); absent unless the head asks for them.
    not_exhaustive: classes of which not all objects are marked, likewise.
  """

  image: Required[UInt8[Array, "*b h w 3"]]
  image_size: Required[Int32[Array, "*b 2"]]
  boxes: Required[Float32[Array, "*b n 4"]]
  labels: Required[Int32[Array, "*b n"]]
  valid: Required[Bool[Array, "*b n"]]
  masks: NotRequired[UInt8[Array, "*b n h w_bytes"]]
  semantic: NotRequired[UInt8[Array, "*b h_semantic w_semantic"]]
  negative: NotRequired[Bool[Array, "*b classes"]]
  not_exhaustive: NotRequired[Bool[Array, "*b classes"]]


class DetectionEvalBatch(Batch):
  """An image to find objects in, from `detection.transforms.DetectionEval`; its truth stays in the source.

  Attributes:
    image: the frame.
    image_size: (height, width) of the image's content in the frame, in pixels.
    original_size: (height, width) of the decoded image in pixels: what predictions are scaled back to.
    image_id: the official id.
  """

  image: Required[UInt8[Array, "*b h w 3"]]
  image_size: Required[Int32[Array, "*b 2"]]
  original_size: Required[Int32[Array, "*b 2"]]
  image_id: Required[Int64[Array, "*b"]]


class SegmentationTrainBatch(Batch):
  """A label map to train on, from `segmentation.transforms.SegmentationTrain`.

  Attributes:
    image: the frame.
    image_size: (height, width) of the image's content in the frame, in pixels.
    labels: class index of every pixel of the frame, 255 without a class.
    segment_labels: the classes that occur in `labels`, in ascending order: Mask2Former's targets. Its n rows
      are `segmentation.max_segments`, or the number of classes where that is less.
    segment_valid: which rows of `segment_labels` are classes.
  """

  image: Required[UInt8[Array, "*b h w 3"]]
  image_size: Required[Int32[Array, "*b 2"]]
  labels: Required[UInt8[Array, "*b h w"]]
  segment_labels: Required[Int32[Array, "*b n"]]
  segment_valid: Required[Bool[Array, "*b n"]]


class SegmentationEvalBatch(Batch):
  """An image to label, from `segmentation.transforms.SegmentationEval`; its truth stays in the source.

  Attributes:
    image: the frame.
    image_size: (height, width) of the image's content in the frame, in pixels.
    original_size: (height, width) of the decoded image in pixels: the size of the predicted label map.
  """

  image: Required[UInt8[Array, "*b h w 3"]]
  image_size: Required[Int32[Array, "*b 2"]]
  original_size: Required[Int32[Array, "*b 2"]]


class DenseTrainBatch(Batch):
  """Normals and depth to train on, from `dense.transforms.DenseTrain`; coordinates as in `dense.sources`.

  Evaluation takes a `SegmentationEvalBatch`.

  Attributes:
    image: the frame.
    image_size: (height, width) of the image's content in the frame, in pixels.
    normals: unit vector of every pixel of the frame, zeros where unknown; absent where they are not learned.
    depth: metres along the optical axis, 0 where unknown; absent where it is not learned.
  """

  image: Required[UInt8[Array, "*b h w 3"]]
  image_size: Required[Int32[Array, "*b 2"]]
  normals: NotRequired[Float32[Array, "*b h w 3"]]
  depth: NotRequired[Float32[Array, "*b h w"]]


class ClipTrainBatch(Batch):
  """A clip to train on, from `video.clips.TrainTransform`.

  Attributes:
    clip: t frames, square, in the order in which they are shown.
    label: class index.
    readable: False where the video cannot be used: the clip is zeros then, and counts nowhere.
  """

  clip: Required[UInt8[Array, "*b t side side 3"]]
  label: Required[Int32[Array, "*b"]]
  readable: Required[Bool[Array, "*b"]]


class ClipEvalBatch(Batch):
  """The views of a video, from `video.clips.EvalTransform`: clips x crops, the crops of one clip in a row.

  Attributes:
    clip: of every view, t frames, square.
    label, readable: as in `ClipTrainBatch`.
  """

  clip: Required[UInt8[Array, "*b views t side side 3"]]
  label: Required[Int32[Array, "*b"]]
  readable: Required[Bool[Array, "*b"]]


class ClassificationBatch(Batch):
  """An image with a label, from `classification.augment.TrainTransform` and `EvalTransform`.

  Attributes:
    image: square. `ClassificationTask.prepare` resizes it on the device, as float32 in 0..255.
    label: class index.
    target: distribution over the classes, smoothed and in training mixed; added by `prepare`.
  """

  image: Required[UInt8[Array, "*b side side 3"]]
  label: Required[Int32[Array, "*b"]]
  target: NotRequired[Float32[Array, "*b classes"]]


class MultiLabelBatch(Batch):
  """As `ClassificationBatch`, of images that may have several classes.

  Attributes:
    image: as there.
    label: 1 for every class of the image, else 0.
    target: as there, with a number in 0..1 for every class.
  """

  image: Required[UInt8[Array, "*b side side 3"]]
  label: Required[Int32[Array, "*b classes"]]
  target: NotRequired[Float32[Array, "*b classes"]]


class NumberedBatch(ClassificationBatch):
  """An image of an evaluation that draws random numbers, from `masked_image_modeling.NumberedEval`.

  Attributes:
    number: of the record in its source, for the device; 0 where it is of no source, as in prediction.
  """

  number: Required[Int32[Array, "*b"]]


class TwoViewBatch(ClassificationBatch):
  """Two views of an image, from `classification.views.TwoViews`.

  Attributes:
    second_image: the other view, of the same size as `image`.
  """

  second_image: Required[UInt8[Array, "*b side side 3"]]


class MultiCropBatch(TwoViewBatch):
  """Two global views of an image and smaller local ones, from `classification.views.MultiCrop`.

  Attributes:
    local_images: the local views; absent where there are none.
  """

  local_images: NotRequired[UInt8[Array, "*b crops local_side local_side 3"]]


def mismatches(batch: Mapping[str, Any], kind: type) -> list[str]:
  """Differences of an example or batch from its description, one sentence each; empty where it fits.

  Axes of one name have one length within a batch.

  Args:
    kind: one of the types above.
  """
  hints = get_type_hints(kind)
  problems = [f"{name} is absent." for name in sorted(kind.__required_keys__) if name not in batch]
  with jaxtyped("context"):
    for name, value in batch.items():
      if name not in hints:
        if not (_SCALES.fullmatch(name) and name.partition(".")[0] in hints):
          problems.append(f"{name} is no key of {kind.__name__}; known: {', '.join(hints)}.")
        continue
      value = value if isinstance(value, jax.Array) else np.asarray(value)
      if not any(isinstance(value, option) for option in get_args(hints[name])):
        expected = get_args(hints[name])[0]
        problems.append(
          f"{name} is {value.dtype}{list(value.shape)}; expected {expected.dtypes[0]} [{expected.dim_str}], "
          "with axes of the same lengths as those of the keys before."
        )
  return problems
