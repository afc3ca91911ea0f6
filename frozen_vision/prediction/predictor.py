"""Prediction on images and videos: several heads, and one backbone pass for those that can share it."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

from flax import nnx
import jax
import numpy as np

from frozen_vision.freezing import prepare
from frozen_vision.prediction import trained_head
from frozen_vision.tasks import pixels, results

Source = pixels.Source


@dataclasses.dataclass(frozen=True)
class Pass:
  """One run of a backbone over a batch, and the heads that read its features.

  Attributes:
    heads: with the same features of the same view; they differ in what they make of them.
    key: what decides the features: the backbone's feature key, and the view of an input.
    batch_size: most inputs of one run.
    reason: why it is not an earlier pass, in words; empty for the first.
  """

  heads: tuple[trained_head.TrainedHead, ...]
  key: dict[str, Any]
  batch_size: int
  reason: str

  @property
  def media(self) -> str:
    return self.heads[0].media

  def describe(self) -> str:
    """One line: who shares this pass, and why it is not an earlier one."""
    names = ", ".join(head.name for head in self.heads)
    what = f"{names}: one backbone pass over every {self.media}" + (
      f" for {len(self.heads)} heads" if len(self.heads) > 1 else ""
    )
    for head in self.heads:
      if head.task.extra_views:
        what += f"; {head.name} makes passes of its own for {head.task.extra_views} more views"
    return f"{what} ({self.reason})." if self.reason else f"{what}."


@dataclasses.dataclass(frozen=True)
class Example:
  """One input, decoded and prepared.

  Attributes:
    picture: what can be drawn on: the image [h, w, 3], or the frames [t, h, w, 3] of the first clip.
    arrays: by head, what its model takes.
  """

  picture: np.ndarray
  arrays: dict[str, dict[str, np.ndarray]]


class Predictor:
  """Trained heads on a frozen backbone.

      predictor = Predictor(None, heads={"detect": "/tmp/demo", "segment": "/tmp/segmentation"})
      print(predictor.describe())
      results = predictor(["a.jpg", pixels])       # arrays: uint8 RGB
      results["detect"][0].boxes                   # xyxy in pixels of a.jpg
      results["segment"][1].labels                 # class of every pixel

  A head is the workdir of its run: the config, the classes and the identity of the frozen features come from
  its checkpoint; averaged parameters are taken where there are some. Heads whose features are the same share
  one backbone pass: the same weights, windows, dtype and so on (`feature_key`), and the same view of an
  input (frame and resizing). Every other head gets a pass of its own, and `describe` says why. Images go to
  the heads for images, videos to those for videos.

  Programs are compiled at the first use of a batch size. All work is done on the first local device.

  Attributes:
    heads: by name.
    passes: in the order in which they are run.
  """

  def __init__(
    self,
    backbone: str | os.PathLike | nnx.Module | None,
    heads: Mapping[str, str | os.PathLike],
    *,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    best: bool = False,
  ):
    """Loads everything; nothing is compiled yet.

    Args:
      backbone: None takes what each head's own config says. Otherwise what `load_backbone` reads (a name, a
        file), or a backbone that it returned: heads that were trained on its features take it; others load
        their own, and `describe` says in which fields the features differ.
      heads: {name: workdir of a training run}.
      image_size: side, or (height, width), of the frame that images are fitted into, ratio kept, padded at
        the right and the bottom. It replaces the test settings of all detection and segmentation heads, so
        that they share a view. None: each as it was evaluated.
      batch_size: most inputs of one pass; None: the smallest `eval_batch_size` of the heads in it.
      best: read the best checkpoints instead of the newest.

    Raises:
      FileNotFoundError: a workdir without a checkpoint, or weights that are not there.
      ValueError: no head, or a head whose features no backbone at hand gives.
    """
    if not heads:
      raise ValueError("No head is given; expected {name: workdir of a training run}.")
    if batch_size is not None and batch_size < 1:
      raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    backbones = prepare.Backbones(backbone)
    self.heads = {
      name: trained_head.load(name, workdir, backbones, best=best, image_size=size)
      for name, workdir in heads.items()
    }
    self.passes = _passes(list(self.heads.values()), batch_size)

  def describe(self) -> str:
    """Lines that say what each head is, who shares a backbone pass, and why others do not."""
    lines = []
    for name, head in self.heads.items():
      line = (
        f"{name}: {head.config.task} with {len(head.classes)} classes, step {head.step} of {head.workdir}"
      )
      if head.differs:
        differs = _shown(head.differs, "given", "own")
        line += f"; it does not fit the given backbone and has its own: {differs}"
      lines.append(f"{line}.")
    return "\n".join(lines + [one.describe() for one in self.passes])

  def takes(self, media: str) -> bool:
    """Whether some head takes an "image" or a "video"."""
    return any(one.media == media for one in self.passes)

  def __call__(self, inputs: Sequence[Source]) -> dict[str, list[results.Result | None]]:
    """Results of every head for every input.

    Args:
      inputs: images and videos: names of files, or arrays uint8 [h, w, 3] and [t, h, w, 3], RGB. The
        frames of an array are taken as they are, without resampling in time.

    Returns:
      {head: [result of each input]}, of the task's `result_type`, such as `Detections`; None where the input
      is a video and the head takes images, or the other way round.

    Raises:
      FileError: a file that cannot be used.
      ValueError: an array that is no image or video, or an input that no head takes.
    """
    if isinstance(inputs, (str, os.PathLike)) or getattr(inputs, "ndim", 4) == 3:
      raise ValueError("Expected a sequence of inputs; for a single image give [image].")
    found: dict[str, list[results.Result | None]] = {name: [None] * len(inputs) for name in self.heads}
    by_media: dict[str, list[int]] = {}
    for index, source in enumerate(inputs):
      by_media.setdefault(pixels.media_of(source), []).append(index)
    for media, indices in by_media.items():
      if not self.takes(media):
        raise ValueError(f"Input {indices[0]} is a{'n' * (media == 'image')} {media}, and no head takes one.")
      for chunk in chunks(indices, self.chunk_size(media)):
        of_chunk = self.run(media, [self.prepare(media, inputs[i]) for i in chunk])
        for name, values in of_chunk.items():
          for i, value in zip(chunk, values):
            found[name][i] = value
    return found

  def chunk_size(self, media: str) -> int:
    """How many inputs to give to `run` at once."""
    return max(one.batch_size for one in self.passes if one.media == media)

  def prepare(self, media: str, source: Source) -> Example:
    """Decodes an input and prepares it for every head that takes it; may run in a thread.

    Raises:
      FileError: a file that cannot be used.
    """
    picture: Any = None
    arrays = {}
    for one in self.passes:
      if one.media != media:
        continue
      shared = None
      for head in one.heads:
        if shared is None or head.task.extra_views:
          shown, prepared = head.task.read_input(source)
          picture = shown if picture is None else picture
          source = shown if media == "image" else source  # decoded once
          shared = prepared if shared is None else shared
          arrays[head.name] = prepared
        else:
          arrays[head.name] = shared
    return Example(picture, arrays)

  def run(self, media: str, examples: Sequence[Example]) -> dict[str, list[results.Result]]:
    """Results of prepared inputs: {head: [result of each]}, of the heads that take them."""
    found: dict[str, list[results.Result]] = {}
    for one in self.passes:
      if one.media != media:
        continue
      for chunk in chunks(examples, one.batch_size):
        for name, values in self._run_pass(one, chunk).items():
          found.setdefault(name, []).extend(values)
    return found

  def _run_pass(self, one: Pass, examples: Sequence[Example]) -> dict[str, list[results.Result]]:
    count = len(examples)
    # Few sizes, so that few programs are compiled: powers of two up to the batch size.
    size = min(1 << (count - 1).bit_length(), one.batch_size)
    batches: dict[int, dict[str, np.ndarray]] = {}  # one for all heads that share arrays
    features, pending = None, []
    for head in one.heads:
      rows = [example.arrays[head.name] for example in examples]
      if id(rows[0]) not in batches:
        rows_of = rows + rows[-1:] * (size - count)
        batches[id(rows[0])] = {name: np.stack([row[name] for row in rows_of]) for name in rows[0]}
      batch = batches[id(rows[0])]
      if features is None and head.task.takes_features:
        features = head.features(batch)
      pending.append((head, batch, head.outputs(batch, features if head.task.takes_features else None)))
    return {
      head.name: head.results(jax.device_get(outputs), batch, count) for head, batch, outputs in pending
    }


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
  """The items in their order, `size` at a time."""
  return [items[start : start + size] for start in range(0, len(items), size)]


def _passes(heads: Sequence[trained_head.TrainedHead], batch_size: int | None) -> tuple[Pass, ...]:
  """Heads that share features, in the order of the first of each."""
  groups: list[tuple[dict[str, Any], list[trained_head.TrainedHead], str]] = []
  for head in heads:
    alone = head.feature_key is None or not head.task.takes_features
    key = {
      "media": head.media,
      **(head.feature_key or {"weights": f"trained with {head.name}"}),
      **head.task.view,
    }
    match = [group for group in groups if group[0] == key and not alone and group[1][0].task.takes_features]
    if match:
      match[0][1].append(head)
      continue
    same_media = [group for group in groups if group[1][0].media == head.media]
    reason = ""
    if not groups:
      pass
    elif head.feature_key is None:
      reason = "its own: some of its backbone was trained with it"
    elif not same_media:
      reason = f"its own: it takes {head.media}s"
    elif not head.task.takes_features:
      reason = "its own: it looks through windows"
    else:
      other, others, _ = same_media[0]
      differs = trained_head.differing(other, key)
      reason = (
        f"its own: it differs from {others[0].name}'s in " + _shown(differs, others[0].name, head.name)
        if differs
        else f"its own: {others[0].name} looks through windows"
      )
    groups.append((key, [head], reason))
  return tuple(
    Pass(tuple(members), key, batch_size or min(head.config.eval_batch_size for head in members), reason)
    for key, members, reason in groups
  )


def _shown(differs: Mapping[str, tuple[Any, Any]], first: str, second: str) -> str:
  def short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] + "..." if len(text) == 64 else text  # a fingerprint

  return "; ".join(f"{name} ({first} {short(a)}, {second} {short(b)})" for name, (a, b) in differs.items())
