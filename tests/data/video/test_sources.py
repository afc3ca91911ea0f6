"""Layouts of labelled videos, and folds by scene."""

import json

import numpy as np
import pytest

from frozen_vision.data.video import sources
from tests import paths

_NAMES = ["a b/1.mp4", "a b/2.MOV", "c/sub/3.webm"]


@pytest.fixture
def tree(tmp_path):
  for name in ("a b/1.mp4", "a b/2.MOV", "c/sub/3.webm", "c/.hidden/4.mp4", "c/notes.txt"):
    (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "all" / name).write_bytes(b"x")
  return tmp_path


def test_class_folders(tree):
  found = sources.open_videos(tree / "all")
  assert found.classes == ["a b", "c"]
  assert [path.removeprefix(f"{tree}/all/") for path in found.paths] == _NAMES
  assert found.labels.tolist() == [0, 0, 1] and found.labels.dtype == np.int32
  assert found[2] == {"path": found.paths[2], "label": 1, "name": found.paths[2]}
  (tree / "all" / "classes.json").write_text(json.dumps(["c", "a b", "z"]))
  found = sources.open_videos(tree / "all")
  assert found.classes == ["c", "a b", "z"] and found.labels.tolist() == [1, 1, 0]
  with pytest.raises(ValueError, match="labels .'a b'., which the 1 classes do not name"):
    sources.open_videos(tree / "all", classes=["c"])
  (tree / "all" / "loose.mp4").write_bytes(b"x")
  with pytest.raises(ValueError, match="loose.mp4 lies outside of any class folder"):
    sources.open_videos(tree / "all")
  (tree / "empty").mkdir()
  with pytest.raises(ValueError, match="there are no videos"):
    sources.open_videos(tree / "empty")


@pytest.mark.parametrize(
  "name, text",
  [
    ("list.txt", "a b/1.mp4 0\n\na b/2.MOV 0\nc/sub/3.webm 2\n"),
    ("list.csv", "a b/1.mp4,0\na b/2.MOV,0\nc/sub/3.webm,2\n"),
    ("list.csv", "label,path,scene\n0,a b/1.mp4,x\n0,a b/2.MOV,y\n2,c/sub/3.webm,x\n"),
    ("list.csv", '\ufeffpath, label\n"a b/1.mp4", 0\na b/2.MOV, 0\nc/sub/3.webm, 2\n'),
  ],
)
def test_lists_of_paths_and_labels(tree, name, text):
  (tree / "all" / name).write_text(text, encoding="utf-8")
  found = sources.open_videos(tree / "all" / name)
  assert [path.removeprefix(f"{tree}/all/") for path in found.paths] == _NAMES
  assert found.labels.tolist() == [0, 0, 2] and found.classes == ["0", "1", "2"]
  (tree / "elsewhere").mkdir()
  moved = (tree / "all" / name).rename(tree / "elsewhere" / name)
  with pytest.raises(FileNotFoundError, match="lists 3 videos, 3 of which are missing, such as .*1.mp4"):
    sources.open_videos(moved)
  assert sources.open_videos(moved, root=tree / "all").paths == found.paths
  # A folder of the list's name beside it.
  (tree / "all").rename(tree / "elsewhere" / "list")
  assert len(sources.open_videos(moved)) == 3


def test_labels_by_name(tree):
  path = tree / "all" / "list.csv"
  path.write_text("path,label\na b/1.mp4,run\na b/2.MOV,jump\n")
  found = sources.open_videos(path)
  assert found.classes == ["jump", "run"] and found.labels.tolist() == [1, 0]
  assert sources.open_videos(path, classes=["run", "jump"]).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "lists no video"),
    ("a b/1.mp4\n", "line 1: expected a path and a label, found 'a b/1.mp4'|missing"),
    ("path,label\na b/1.mp4,\n", "record 1: path or label is empty"),
  ],
)
def test_lists_that_cannot_be_read(tree, text, message):
  path = tree / "all" / "list.csv"
  path.write_text(text)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    sources.open_videos(path)


def test_other_errors(tree):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    sources.open_videos(tree / "absent")
  (tree / "list.json").write_text("[]")
  with pytest.raises(ValueError, match="neither a folder nor a list"):
    sources.open_videos(tree / "list.json")
  path = tree / "all" / "list.csv"
  path.write_text("path,label\na b/1.mp4,3\n")
  with pytest.raises(ValueError, match="label 3, but there are 2 classes"):
    sources.open_videos(path, classes=["a", "b"])
  with pytest.raises(ValueError, match="no column 'scene'; its columns are"):
    sources.open_videos(path, group_column="scene")


def _fights():
  folder = paths.data_dir("fight_video")
  return sources.concatenate(
    [sources.open_videos(folder / f"{name}.csv", group_column="scene_group") for name in ("train", "val")]
  )


def test_real_clips_by_scene():
  everything = _fights()
  assert len(everything) == 140 and np.bincount(everything.labels).tolist() == [70, 70]
  seen = []
  for fold in range(5):
    train, validation = sources.split_fold(everything, fold, 5)
    assert len(train) + len(validation) == 140
    assert not set(train.groups) & set(validation.groups)
    assert abs(len(validation) - 28) <= 3 and abs(int(np.diff(np.bincount(validation.labels))[0])) <= 4
    assert sources.split_fold(everything, fold, 5)[1].paths == validation.paths
    seen += validation.paths
  assert sorted(seen) == sorted(everything.paths)
  with pytest.raises(ValueError, match="Fold 5 of 5"):
    sources.split_fold(everything, 5, 5)


def test_videos_without_groups_are_groups_of_their_own():
  everything = sources.VideoList([f"{i}.mp4" for i in range(10)], [i % 2 for i in range(10)], ["a", "b"])
  train, validation = sources.split_fold(everything, 2, 5)
  assert len(train) == 8 and sorted(validation.labels.tolist()) == [0, 1]


def test_lists_of_different_classes_do_not_go_together():
  lists = [sources.VideoList([], [], classes) for classes in (["a"], ["b"])]
  with pytest.raises(ValueError, match="different classes"):
    sources.concatenate(lists)
