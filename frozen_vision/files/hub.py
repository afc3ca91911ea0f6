"""Weights from the Hugging Face Hub, through its own client: resumed, cached and checked."""

import importlib
import pathlib
import re
from typing import Any

from frozen_vision.files import checkpoint_file, download

_INDEX, _SINGLE = checkpoint_file.WEIGHTS_IN_FOLDERS
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_weights(repository: str) -> pathlib.Path:
  """The weights of a repository, fetched into the Hub's cache unless they are there.

  They are `model.safetensors`, or all the shards of its index. What was fetched is compared with the SHA-256
  by which the Hub knows it.

  Args:
    repository: such as `facebook/dinov2-small`.

  Returns:
    `model.safetensors`, or the index, with its shards beside it.

  Raises:
    ModuleNotFoundError: `huggingface_hub` is not installed.
    PermissionError: the repository is gated; says how to ask for access and how to log in.
    FileNotFoundError: no such repository, or no safetensors in it.
    ConnectionError: what is not in the cache cannot be fetched.
    ValueError: a file that is damaged.
  """
  client = _client()
  try:
    single = _fetch(client, repository, _SINGLE)
    if single is not None:
      return single
    index = _fetch(client, repository, _INDEX)
    if index is None:
      raise FileNotFoundError(
        f"{_page(repository)} holds neither {_SINGLE} nor {_INDEX}; fetch its weights by hand."
      )
    for shard in sorted(checkpoint_file.shards_of_index(index)):
      if _fetch(client, repository, shard.name) is None:
        raise FileNotFoundError(f"{_page(repository)} lacks {shard.name}, which its {_INDEX} lists.")
    return index
  except client.errors.GatedRepoError as error:
    raise PermissionError(
      f"{repository} is gated: ask for access at {_page(repository)}, then log in with `hf auth login`, or "
      "set HF_TOKEN to a token of that account."
    ) from error
  except client.errors.RepositoryNotFoundError as error:
    raise FileNotFoundError(
      f"There is no repository {_page(repository)}, or it is private; if it is yours, log in with "
      "`hf auth login`."
    ) from error


def _client() -> Any:
  try:
    return importlib.import_module("huggingface_hub")
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "Fetching weights from the Hugging Face Hub needs huggingface_hub. Install it with: pip install "
      "huggingface_hub. Or fetch the weights elsewhere and give their path."
    ) from error


def _fetch(client: Any, repository: str, name: str) -> pathlib.Path | None:
  """A file of a repository in the cache; None if the repository has no file of this name."""
  cached = client.try_to_load_from_cache(repository, name)
  if isinstance(cached, str):
    return pathlib.Path(cached)
  errors = client.errors
  try:
    path = pathlib.Path(client.hf_hub_download(repository, name))
  except (errors.GatedRepoError, errors.RepositoryNotFoundError):
    raise
  except errors.LocalEntryNotFoundError as error:
    raise _unreachable(repository, name, error) from error
  except errors.EntryNotFoundError:
    return None
  except OSError as error:
    raise _unreachable(repository, name, error) from error
  # The cache names a large file by its SHA-256.
  wanted = path.resolve().name
  if _SHA256.fullmatch(wanted) and download.file_sha256(path) != wanted:
    path.resolve().unlink()
    raise ValueError(f"{path} was damaged on its way from {_page(repository)} and removed; fetch it again.")
  return path


def _unreachable(repository: str, name: str, error: Exception) -> ConnectionError:
  return ConnectionError(
    f"{name} of {_page(repository)} is not in the cache and could not be fetched ({error}). A further try "
    "continues; without a network, fetch it elsewhere and give its path."
  )


def _page(repository: str) -> str:
  return f"https://huggingface.co/{repository}"
