"""Generated clips whose classes differ only in motion, for a first run with nothing to download.

A textured shape lies on a textured still background and moves to the left, right, up or down, grows or
shrinks. Where it is and how large are phases on a circle (what leaves on one side comes back on the other,
what has grown to the largest size starts again at the smallest), each drawn uniformly for every class; a
class only says which phase runs, and in which direction. Hence a single frame, whichever it is, has the same
distribution in every class: nothing but motion tells them apart.

A clip is a pure function of (seed, split, index, number of frames, image size).
"""

from jaxtyping import Float32, UInt8
import numpy as np

from frozen_vision.data.generated import painting

CLASS_NAMES = ("left", "right", "up", "down", "growing", "shrinking")
MIN_IMAGE_SIDE = 32
# The least and the most that the phase moves during a clip, in cycles.
_TRAVEL = (0.4, 0.8)
_SPLITS = {"train": 0, "validation": 1}
# The shape's radius at phase 0 and just before phase 1, as a fraction of the image's side.
_RADIUS = (0.10, 0.28)


class MotionClipSource:
  """Random access to `num_clips` generated clips.

  Args:
    num_clips: number of clips; clip i does not depend on it.
    num_frames: frames per clip. The motion spreads over all of them.
    image_size: side of the square frames in pixels, at least 32.
    seed: non-negative integer.
    split: "train" or "validation"; the two never share a clip.

  Raises:
    ValueError: for values out of these ranges.
  """

  classes = list(CLASS_NAMES)

  def __init__(
    self, num_clips: int, num_frames: int = 8, image_size: int = 64, seed: int = 0, split: str = "train"
  ):
    if split not in _SPLITS:
      raise ValueError(f"split is {split!r}; expected one of {sorted(_SPLITS)}.")
    if num_clips < 0 or num_frames < 1 or image_size < MIN_IMAGE_SIDE or not 0 <= seed < 2**32:
      raise ValueError(
        f"num_clips={num_clips}, num_frames={num_frames}, image_size={image_size}, seed={seed}; expected "
        f"num_clips >= 0, num_frames >= 1, image_size >= {MIN_IMAGE_SIDE} and 0 <= seed < 2**32."
      )
    self.num_clips = int(num_clips)
    self.num_frames = int(num_frames)
    self.image_size = int(image_size)
    self.seed = int(seed)
    self.split = split

  def __len__(self) -> int:
    return self.num_clips

  def __repr__(self) -> str:
    return (
      f"MotionClipSource(num_clips={self.num_clips}, num_frames={self.num_frames}, "
      f"image_size={self.image_size}, seed={self.seed}, split={self.split!r})"
    )

  def __getitem__(self, index: int) -> dict:
    """The record {frames: uint8 [t, side, side, 3], label: int32, name}.

    Labels take turns, so that every run of six clips has each class once. Raises IndexError outside of
    [0, num_clips).
    """
    if not 0 <= index < self.num_clips:
      raise IndexError(f"clip {index} of {self.num_clips}.")
    index = int(index)
    label = index % len(CLASS_NAMES)
    return {
      "frames": self.render(index, label),
      "label": np.int32(label),
      "name": f"clip_{self.split}_{self.seed}_{index:06d}",
    }

  def render(self, index: int, label: int) -> UInt8[np.ndarray, "t side side 3"]:
    """The frames that clip `index` has if its class is `label`.

    Everything random is drawn before the class is looked at: the same index shows the same shape, colours,
    background and first frame in every class.
    """
    rng = painting.Random(self.seed, _SPLITS[self.split], index)
    side = self.image_size
    background = painting.paint_background(rng, side, side)
    phases = np.array([rng.uniform() for _ in range(3)])  # of x, y and size
    shape, proportion = rng.integer(0, len(painting.CLASS_NAMES)), rng.uniform()
    direction = rng.direction()
    colours = rng.array(8, 3)
    colour = max(colours, key=lambda c: float(np.abs(c - background.mean((0, 1))).sum()))
    stripe = np.float32(0.5) * colour + np.float32(0.5) * rng.array(3)
    travel = rng.uniform(*_TRAVEL)
    axis, sign = _MOTIONS[CLASS_NAMES[label]]
    frames = []
    for t in range(self.num_frames):
      now = phases.copy()
      now[axis] = (now[axis] + sign * travel * t / max(self.num_frames - 1, 1)) % 1.0
      radius = side * (_RADIUS[0] + now[2] * (_RADIUS[1] - _RADIUS[0]))
      canvas = background.copy()
      # On a torus: copies beyond each edge show what has left there.
      for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
          x, y = side * (now[0] + dx), side * (now[1] + dy)
          if -radius - 2 < x < side + radius + 2 and -radius - 2 < y < side + radius + 2:
            _paint(canvas, painting.Shape(shape, x, y, radius, direction, proportion), colour, stripe)
      frames.append((np.clip(canvas, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8))
    return np.stack(frames)


# (phase that runs, its direction); y grows downwards.
_MOTIONS = {
  "left": (0, -1),
  "right": (0, 1),
  "up": (1, -1),
  "down": (1, 1),
  "growing": (2, 1),
  "shrinking": (2, -1),
}


def _paint(
  canvas: Float32[np.ndarray, "h w 3"],
  shape: painting.Shape,
  colour: Float32[np.ndarray, "3"],
  stripe: Float32[np.ndarray, "3"],
) -> None:
  """Blends a striped shape into the canvas, in place; its texture moves and grows with it."""
  patch = painting.make_patch(shape, *canvas.shape[:2])
  view = canvas[patch.rows, patch.columns]
  wave = (np.floor(patch.u * (2 / shape.radius)) % 2).astype(np.float32)[..., None]
  rim = np.clip(patch.distance * 0.5 + 1.25, 0, 1).astype(np.float32)[..., None]
  paint = (colour + wave * (stripe - colour)) * (1 - np.float32(0.5) * rim)
  alpha = np.clip(0.5 - patch.distance, 0, 1).astype(np.float32)[..., None]
  view += alpha * (paint - view)
