"""Hosts that were started with different things are named before the first step."""

from frozen_vision.training import hosts

_FACTS = {
  "host": "a",
  "versions": {"jax": "0.10.2"},
  "config": {"batch_size": 4, "loader": {"workers": 2}},
  "data": {
    "training": {"examples": 50, "file sizes": "aa", "labels": "aa"},
    "validation": {"examples": 3, "annotations": "aa"},
  },
}


def _said(**changes):
  return list(hosts.differences([_FACTS, _FACTS | {"host": "b"}, _FACTS | {"host": "c"} | changes], 2))


def test_equal_hosts_have_nothing_to_say():
  assert _said() == []
  assert _said(config={"batch_size": 4, "loader": {"workers": 0}}) == []  # each has its own cores


def test_data():
  training = _FACTS["data"]["training"]
  assert _said(data=_FACTS["data"] | {"training": training | {"examples": 49, "file sizes": "ab"}}) == [
    "host 2 (c) found 49 training examples where host 0 (a) found 50"
  ]
  assert _said(data=_FACTS["data"] | {"training": training | {"file sizes": "ab", "labels": "ab"}}) == [
    "the training examples of host 2 (c) have other file sizes, labels than those of host 0 (a)"
  ]
  assert _said(data={"training": training}) == [
    "host 2 (c) found 0 validation examples where host 0 (a) found 3"
  ]


def test_config_versions_and_weights():
  assert _said(config={"batch_size": 8, "loader": {}}, versions={"jax": "0.11"}) == [
    'host 2 (c) has versions jax "0.11" where host 0 (a) has "0.10.2"',
    "host 2 (c) has config batch_size 8 where host 0 (a) has 4",
  ]
  one = {"host": "a", "weights": {"frozen": {"weights": "x"}, "trainable": "y"}}
  other = {"host": "b", "weights": {"frozen": {"weights": "z"}, "trainable": "y"}}
  assert list(hosts.differences([one, other], 1)) == [
    'host 1 (b) has weights frozen.weights "z" where host 0 (a) has "x"'
  ]
