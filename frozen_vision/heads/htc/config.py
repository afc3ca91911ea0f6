"""Configuration of HTC; (Cascade) Mask R-CNN is the same head with parts switched off."""

import dataclasses
from typing import Annotated, Any, Literal

from frozen_vision.heads.base import DetectionHeadConfig
from frozen_vision.options import Count, Fraction, from_data, Natural, NonNegative, Positive, Range

Quad = tuple[Positive, Positive, Positive, Positive]


@dataclasses.dataclass(frozen=True)
class HTCConfig(DetectionHeadConfig):
  """Every choice of the head. Defaults are HTC R50-FPN without the semantic branch.

  Values are those of mmdet 3.3.0 configs/htc/htc-without-semantic_r50_fpn_1x_coco.py, except where
  another source is named in brackets; [ours] marks our own choices, with the reason.

  Attributes:
    num_classes: foreground classes; the background is the class after the last.
    name: which head the defaults are of, a row of `PRESETS`.
    activation: of all layers but the semantic branch's: `relu` or `swish`.
    anchor_scales: anchor side in strides. anchor_ratios: height over width.
    rpn_channels: channels of the RPN's 3x3 convolution.
    rpn_positive_iou, rpn_negative_iou: anchors at or above are positive, below negative, between
      ignored.
    rpn_min_positive_iou: an object's best anchors are positive too if they overlap it this much.
    rpn_samples, rpn_positive_fraction: anchors per image in the RPN loss, and the largest fraction of
      positives.
    rpn_box_beta: where SmoothL1 turns linear; 0 is L1.
    allowed_border: pixels by which a training anchor may leave the image; negative: no limit.
    train_pre_nms, train_proposals: proposals per level before NMS and per image after it, in
      training.
    test_pre_nms, test_proposals: the same in prediction.
    proposal_nms_iou: NMS threshold of the proposals, within each level.
    min_proposal_size: proposals not wider and higher than this many pixels are dropped.
    stage_ious: IoU of a positive roi, per cascade stage; its length is the number of stages.
    stage_stds: scales of the regression targets, per stage.
    stage_loss_weights: weight of all losses of a stage.
    match_low_quality: an object's best rois become its own even where they overlap another object
      more.
    roi_samples, roi_positive_fraction: rois per image and stage in training, and the largest fraction
      of positives.
    class_specific_boxes: regress one box per class (Mask R-CNN) and not one for all.
    box_beta: as rpn_box_beta, for the stages.
    roi_levels: the first levels of the pyramid serve rois; finest_scale: side of the rois at which
      a roi leaves the first level (twice this).
    box_roi_size, mask_roi_size: cells per side of the roi features; a mask has twice as many.
    sampling_ratio: RoIAlign's sample points per bin and axis; None adapts them to the roi's size,
      as mmdet does. [Detectron, configs/12_2017_baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml]: 2.
    num_box_convs, box_conv_channels: 3x3 convolutions of a box head before its fully connected
      layers; 4 with num_fcs=1 is Shared4Conv1FC, the box head of HTC++
      [ViT-Adapter's Swin-L HTC++ config, with no norm].
    box_conv_norm: "none", or "group" (32 groups). The Cascade configs of Swin normalise these over
      the batches of all devices (SyncBN); not offered: its running statistics would be state
      that neither trains nor is frozen, and it depends on how many rois of which images meet.
    fc_channels, num_fcs: the fully connected layers of a box head.
    mask_channels, mask_convs: the convolutions of a mask head.
    with_masks: False leaves out the mask branch.
    interleaved: the mask branch of a stage trains on the boxes which the stage just refined.
    mask_info_flow: a mask head also sees the features of the mask head before it.
    mask_average: "all" stages' probabilities are averaged [mmdet 2.28.2; Cascade Mask R-CNN in both
      versions], or the "last" stage predicts alone (HTC in mmdet 3.3.0).
    class_loss: "softmax" with a background class; or "sigmoid", a probability for each class alone, as
      Detectron2's `use_sigmoid_ce`: the background's logit is without use.
    federated_classes: classes of a batch that the sigmoid loss looks at: those of its rois, background
      counted, and others drawn by frequency (CenterNet2's federated loss; 50 there); 0 for all. Classes that
      an image was searched for in vain count for it too, and those of which it marks only some objects count
      for rois of these objects alone.
    federated_power: power of a class's number of training images by which it is drawn [CenterNet2].
    class_balance: beta of class-balanced weights (1 - beta) / (1 - beta^n) of objects, n those of the class
      in the training data, one on average over classes (Cui et al., arXiv 1901.05555); 0 for none.
    class_average: what is averaged over the stages for a class's score, "logits" or, as in TensorFlow
      Model Garden, "probabilities".
    score_threshold, nms_iou, max_detections: of the final detections.
    nms_kind: "hard", or soft-NMS, which lowers the scores of overlapping boxes and does not drop
      them: "soft_linear" (from nms_iou on) or "soft_gaussian" (with soft_nms_sigma)
      [mmcv 2.1.0 soft_nms, with its sigma and min_score; HTC++ (Swin, arXiv 2103.14030, A2.2)
      names soft-NMS, and mmcv's default is the linear one].
    soft_nms_min_score: soft-NMS drops boxes whose score falls below.
    pre_nms_detections: with class_specific_boxes, the (roi, class) pairs with the best scores that
      enter the final hard NMS [ours: a static bound; exact as long as max_detections of them
      survive]. Soft-NMS needs no such bound.
    semantic_classes: classes of the semantic branch; 0 leaves it out. COCO-stuff: 183.
    semantic_level: index of the pyramid level on which the semantic branch works (1: stride 8).
    semantic_convs, semantic_channels, semantic_loss_weight, semantic_ignore: of that branch.
  """

  num_classes: int = from_data(80)
  name: Literal["htc", "cascade_mask_rcnn", "mask_rcnn", "tf_mask_rcnn", "tf_cascade_mask_rcnn"] = "htc"
  activation: Literal["relu", "swish"] = "relu"

  anchor_scales: tuple[Positive, ...] = (8.0,)
  anchor_ratios: tuple[Positive, ...] = (0.5, 1.0, 2.0)
  rpn_channels: Count = 256
  rpn_positive_iou: Fraction = 0.7
  rpn_negative_iou: Fraction = 0.3
  rpn_min_positive_iou: Fraction = 0.3
  rpn_samples: Count = 256
  rpn_positive_fraction: Fraction = 0.5
  rpn_box_beta: NonNegative = 1 / 9
  allowed_border: float = 0
  train_pre_nms: Count = 2000
  train_proposals: Count = 2000
  test_pre_nms: Count = 1000
  test_proposals: Count = 1000
  proposal_nms_iou: Fraction = 0.7
  min_proposal_size: NonNegative = 0.0

  stage_ious: tuple[Fraction, ...] = (0.5, 0.6, 0.7)
  stage_stds: tuple[Quad, ...] = (
    (0.1, 0.1, 0.2, 0.2),
    (0.05, 0.05, 0.1, 0.1),
    (0.033, 0.033, 0.067, 0.067),
  )
  stage_loss_weights: tuple[NonNegative, ...] = (1.0, 0.5, 0.25)
  match_low_quality: bool = True
  roi_samples: Count = 512
  roi_positive_fraction: Fraction = 0.25
  class_specific_boxes: bool = False
  box_beta: NonNegative = 1.0

  roi_levels: Count = 4
  finest_scale: Positive = 56.0
  box_roi_size: Count = 7
  mask_roi_size: Count = 14
  sampling_ratio: Count | None = 2
  num_box_convs: Natural = 0
  box_conv_channels: Count = 256
  box_conv_norm: Literal["none", "group"] = "none"
  fc_channels: Count = 1024
  num_fcs: Count = 2
  mask_channels: Count = 256
  mask_convs: Natural = 4
  with_masks: bool = True
  interleaved: bool = True
  mask_info_flow: bool = True
  mask_average: Literal["all", "last"] = "all"

  class_loss: Literal["softmax", "sigmoid"] = "softmax"
  federated_classes: Natural = 0
  federated_power: NonNegative = 0.5
  class_balance: Fraction = 0.0
  class_average: Literal["logits", "probabilities"] = "logits"
  score_threshold: Fraction = 0.001
  nms_kind: Literal["hard", "soft_linear", "soft_gaussian"] = "hard"
  nms_iou: Fraction = 0.5
  soft_nms_sigma: Positive = 0.5
  soft_nms_min_score: Fraction = 1e-3
  max_detections: Count = 100
  pre_nms_detections: Count = 2000

  semantic_classes: Natural = 0
  semantic_level: Natural = 1
  semantic_convs: Natural = 4
  semantic_channels: Count = 256
  semantic_loss_weight: NonNegative = 0.2
  semantic_ignore: Annotated[int, Range(0, 255)] = 255

  def __post_init__(self):
    lengths = {name: len(getattr(self, name)) for name in ("stage_ious", "stage_stds", "stage_loss_weights")}
    if len(set(lengths.values())) != 1 or not self.stage_ious:
      raise ValueError(f"HTCConfig: per-stage fields must have one equal, positive length, found {lengths}.")
    for name, known in (
      ("mask_average", ("all", "last")),
      ("nms_kind", ("hard", "soft_linear", "soft_gaussian")),
      ("box_conv_norm", ("none", "group")),
      ("activation", ("relu", "swish")),
      ("class_loss", ("softmax", "sigmoid")),
      ("class_average", ("logits", "probabilities")),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"HTCConfig.{name} is {getattr(self, name)!r}; known: {known}.")
    if self.federated_classes and self.class_loss != "sigmoid":
      raise ValueError(
        f"HTCConfig: federated_classes is {self.federated_classes}, and a softmax is over all "
        "classes; set class_loss='sigmoid'."
      )
    if self.class_balance >= 1:
      raise ValueError(f"HTCConfig.class_balance is {self.class_balance}; expected below 1, such as 0.999.")
    if self.num_box_convs and self.box_conv_norm == "group" and self.box_conv_channels % 32:
      raise ValueError(
        f"HTCConfig: box_conv_norm='group' has 32 groups, but box_conv_channels is"
        f" {self.box_conv_channels}; give a multiple of 32, or box_conv_norm='none'."
      )
    if self.semantic_classes and self.mask_roi_size % self.box_roi_size:
      raise ValueError(
        f"HTCConfig: with the semantic branch mask_roi_size ({self.mask_roi_size}) must be a"
        f" multiple of box_roi_size ({self.box_roi_size}); its roi features are pooled from one"
        " to the other."
      )

  @property
  def num_stages(self) -> int:
    return len(self.stage_ious)

  @property
  def reads_class_lists(self) -> bool:
    return self.federated_classes > 0

  @property
  def reads_class_counts(self) -> bool:
    return self.federated_classes > 0 or self.class_balance > 0

  @property
  def mask_size(self) -> int:
    """Cells per side of a predicted mask: the deconvolution doubles the roi features."""
    return 2 * self.mask_roi_size


_MASK_RCNN = dict(
  stage_ious=(0.5,),
  stage_stds=((0.1, 0.1, 0.2, 0.2),),
  stage_loss_weights=(1.0,),
  interleaved=False,
  mask_info_flow=False,
  score_threshold=0.05,
)
# TensorFlow Model Garden's Faster and Mask R-CNN as Proper Reuse (arXiv 2204.00484) released them
# (official/projects/backbone_reuse on official/vision/configs/maskrcnn.py), on a pyramid of strides 4 to 64.
# What stays as in HTC: group norms in the box head and none in the mask head, where theirs have batch norms;
# SmoothL1 in the RPN, of which their Huber loss with delta 1/9 is a ninth; a mask head for each stage.
_TF = _MASK_RCNN | dict(
  activation="swish",
  rpn_min_positive_iou=0.0,
  allowed_border=-1,
  train_proposals=1000,
  match_low_quality=False,
  class_specific_boxes=True,
  roi_levels=5,
  num_box_convs=4,
  box_conv_norm="group",
)
# Fields that differ from the defaults, by name.
PRESETS: dict[str, dict[str, Any]] = {
  "htc": {},
  "cascade_mask_rcnn": dict(
    interleaved=False, mask_info_flow=False, match_low_quality=False, score_threshold=0.05
  ),
  "mask_rcnn": _MASK_RCNN
  | dict(class_specific_boxes=True, rpn_box_beta=0.0, box_beta=0.0, allowed_border=-1, train_proposals=1000),
  "tf_mask_rcnn": _TF,
  "tf_cascade_mask_rcnn": _TF
  | dict(
    stage_ious=(0.5, 0.7, 0.8),
    stage_stds=HTCConfig.stage_stds,
    stage_loss_weights=(1 / 3, 1 / 3, 1 / 3),
    class_specific_boxes=False,
    class_average="probabilities",
  ),
}


def preset(row: str, /, **changes) -> HTCConfig:
  """The head of a row of `PRESETS`, with changes."""
  return HTCConfig(**{"name": row, **PRESETS[row], **changes})


def htc(**changes) -> HTCConfig:
  """HTC R50-FPN without the semantic branch (box AP 42.3, mask AP 37.4 in 1x, mmdet's metafile)."""
  return preset("htc", **changes)


def cascade_mask_rcnn(**changes) -> HTCConfig:
  """Cascade Mask R-CNN as in mmdet 3.3 configs/_base_/models/cascade-mask-rcnn_r50_fpn.py."""
  return preset("cascade_mask_rcnn", **changes)


def mask_rcnn(**changes) -> HTCConfig:
  """Mask R-CNN as in mmdet 3.3 configs/_base_/models/mask-rcnn_r50_fpn.py."""
  return preset("mask_rcnn", **changes)
