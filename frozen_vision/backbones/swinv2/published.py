"""Public SwinV2 weights by name: where they are published, and where they lie once fetched."""

import dataclasses
import difflib
import os
import pathlib

from frozen_vision.files import download as fetch

_RELEASE = "https://github.com/SwinTransformer/storage/releases/download/v2.0.0"


@dataclasses.dataclass(frozen=True)
class NamedWeights:
  """One public file.

  Attributes:
    variant: the row of `swinv2.VARIANTS`.
    url: where its authors publish it.
    parameters: of the network with its classifier; in float32, so the file has at least four times as many
      bytes.
    licence: of the repository that publishes it.
    sha256: of the file; None where it is not known.
  """

  variant: str
  url: str
  parameters: int
  licence: str = "MIT"
  sha256: str | None = None

  @property
  def file(self) -> str:
    """The name as published: it tells the windows (`convert.windows`)."""
    return self.url.rsplit("/", 1)[-1]

  @property
  def least_bytes(self) -> int:
    return 4 * self.parameters


def _microsoft(variant: str, file: str, parameters: int) -> NamedWeights:
  return NamedWeights(variant, f"{_RELEASE}/{file}.pth", parameters)


# The files that MODELHUB.md of github.com/microsoft/Swin-Transformer lists. 22k: 21841 classes of
# ImageNet-22K, pretrained at 192 px; 22kto1k_ft: the same, fine-tuned on the 1000 classes of ImageNet-1K; the
# others were trained on ImageNet-1K alone. Names are those of the files without their "patch4".
TABLE: dict[str, NamedWeights] = {
  "swinv2_tiny_window8_256": _microsoft("swinv2_t", "swinv2_tiny_patch4_window8_256", 28_347_154),
  "swinv2_tiny_window16_256": _microsoft("swinv2_t", "swinv2_tiny_patch4_window16_256", 28_347_154),
  "swinv2_small_window8_256": _microsoft("swinv2_s", "swinv2_small_patch4_window8_256", 49_728_418),
  "swinv2_small_window16_256": _microsoft("swinv2_s", "swinv2_small_patch4_window16_256", 49_728_418),
  "swinv2_base_window8_256": _microsoft("swinv2_b", "swinv2_base_patch4_window8_256", 87_918_816),
  "swinv2_base_window16_256": _microsoft("swinv2_b", "swinv2_base_patch4_window16_256", 87_918_816),
  "swinv2_base_window12_192_22k": _microsoft("swinv2_b", "swinv2_base_patch4_window12_192_22k", 109_280_841),
  "swinv2_base_window12to16_192to256_22kto1k_ft": _microsoft(
    "swinv2_b", "swinv2_base_patch4_window12to16_192to256_22kto1k_ft", 87_918_816
  ),
  "swinv2_base_window12to24_192to384_22kto1k_ft": _microsoft(
    "swinv2_b", "swinv2_base_patch4_window12to24_192to384_22kto1k_ft", 87_918_816
  ),
  "swinv2_large_window12_192_22k": _microsoft(
    "swinv2_l", "swinv2_large_patch4_window12_192_22k", 228_772_549
  ),
  "swinv2_large_window12to16_192to256_22kto1k_ft": _microsoft(
    "swinv2_l", "swinv2_large_patch4_window12to16_192to256_22kto1k_ft", 196_739_932
  ),
  "swinv2_large_window12to24_192to384_22kto1k_ft": _microsoft(
    "swinv2_l", "swinv2_large_patch4_window12to24_192to384_22kto1k_ft", 196_739_932
  ),
}


def cache_folder() -> pathlib.Path:
  """$FROZEN_VISION_CACHE, or ~/.cache/frozen_vision."""
  return pathlib.Path(os.environ.get("FROZEN_VISION_CACHE") or "~/.cache/frozen_vision").expanduser()


def local_path(name: str) -> pathlib.Path:
  """The file of these weights, fetched if it is not in the cache folder yet.

  Raises:
    ValueError: no such name; or a file that is not the published one.
    ConnectionError: it is not there and cannot be fetched; says what to put where.
  """
  if name not in TABLE:
    close = difflib.get_close_matches(name, TABLE, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"No weights are known as {name!r}; known: {sorted(TABLE)}.{hint}")
  entry = TABLE[name]
  path = cache_folder() / entry.file
  if not path.is_file():
    return fetch.fetch(entry.url, path, sha256=entry.sha256, least_bytes=entry.least_bytes)
  # It may have been put there by hand.
  size = path.stat().st_size
  found = fetch.file_sha256(path) if entry.sha256 else None
  if size < entry.least_bytes or found != entry.sha256:
    small = size < entry.least_bytes
    wanted = f"at least {entry.least_bytes:,} bytes" if small else f"the SHA-256 {entry.sha256}"
    hashed = f" with the SHA-256 {found}" if found else ""
    raise ValueError(
      f"{path} has {size:,} bytes{hashed}, but {entry.url} has {wanted}. Remove the file to have it "
      "fetched again."
    )
  return path
