"""Layouts of labelled videos, and folds by scene."""

import json
import pathlib

import numpy as np
import pytest

from frozen_vision.data.video import lists, sources
from tests import paths

_NAMES = ["a b/1.mp4", "a b/2.MOV", "c/sub/3.webm"]


@pytest.fixture
def tree(tmp_path):
  for name in ("a b/1.mp4", "a b/2.MOV", "c/sub/3.webm", "c/.hidden/4.mp4", "c/notes.txt"):
    (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "all" / name).write_bytes(b"x")
  return tmp_path


def test_class_folders(tree):
  found = lists.open_videos(tree / "all")
  assert found.classes == ["a b", "c"]
  assert [path.removeprefix(f"{tree}/all/") for path in found.paths] == _NAMES
  assert found.labels.tolist() == [0, 0, 1] and found.labels.dtype == np.int32
  assert found[2] == {"path": found.paths[2], "label": 1, "name": found.paths[2]}
  (tree / "all" / "classes.json").write_text(json.dumps(["c", "a b", "z"]))
  found = lists.open_videos(tree / "all")
  assert found.classes == ["c", "a b", "z"] and found.labels.tolist() == [1, 1, 0]
  with pytest.raises(ValueError, match="labels .'a b'., which the 1 classes do not name"):
    lists.open_videos(tree / "all", classes=["c"])
  (tree / "all" / "loose.mp4").write_bytes(b"x")
  with pytest.raises(ValueError, match="loose.mp4 lies outside of any class folder"):
    lists.open_videos(tree / "all")
  (tree / "empty").mkdir()
  with pytest.raises(ValueError, match="there are no videos"):
    lists.open_videos(tree / "empty")


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
  found = lists.open_videos(tree / "all" / name)
  assert [path.removeprefix(f"{tree}/all/") for path in found.paths] == _NAMES
  assert found.labels.tolist() == [0, 0, 2] and found.classes == ["0", "1", "2"]
  (tree / "elsewhere").mkdir()
  moved = (tree / "all" / name).rename(tree / "elsewhere" / name)
  with pytest.raises(FileNotFoundError, match="lists 3 videos, 3 of which are missing, such as .*1.mp4"):
    lists.open_videos(moved)
  assert lists.open_videos(moved, root=tree / "all").paths == found.paths
  # A folder of the list's name beside it.
  (tree / "all").rename(tree / "elsewhere" / "list")
  assert len(lists.open_videos(moved)) == 3


def test_labels_by_name(tree):
  path = tree / "all" / "list.csv"
  path.write_text("path,label\na b/1.mp4,run\na b/2.MOV,jump\n")
  found = lists.open_videos(path)
  assert found.classes == ["jump", "run"] and found.labels.tolist() == [1, 0]
  assert lists.open_videos(path, classes=["run", "jump"]).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "lists no video"),
    ("a b/1.mp4\n", "line 1: expected a path and a label, found 'a b/1.mp4'|missing"),
    ("path,label\na b/1.mp4,\n", "line 2: path or label is empty"),
  ],
)
def test_lists_that_cannot_be_read(tree, text, message):
  path = tree / "all" / "list.csv"
  path.write_text(text)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    lists.open_videos(path)


def test_other_errors(tree):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    lists.open_videos(tree / "absent")
  (tree / "list.json").write_text("[]")
  with pytest.raises(ValueError, match="neither a folder nor a list"):
    lists.open_videos(tree / "list.json")
  path = tree / "all" / "list.csv"
  path.write_text("path,label\na b/1.mp4,3\n")
  with pytest.raises(ValueError, match="label 3, but there are 2 classes"):
    lists.open_videos(path, classes=["a", "b"])
  with pytest.raises(ValueError, match="no column 'scene'; its columns are"):
    lists.open_videos(path, group_column="scene")


def _fights():
  folder = paths.data_dir("fight_video")
  return sources.concatenate(
    [lists.open_videos(folder / f"{name}.csv", group_column="scene_group") for name in ("train", "val")]
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
  everything = sources.VideoList(
    [pathlib.Path(f"{i}.mp4") for i in range(10)], [i % 2 for i in range(10)], ["a", "b"]
  )
  train, validation = sources.split_fold(everything, 2, 5)
  assert len(train) == 8 and sorted(validation.labels.tolist()) == [0, 1]


def test_lists_of_different_classes_do_not_go_together():
  lists = [sources.VideoList([], [], classes) for classes in (["a"], ["b"])]
  with pytest.raises(ValueError, match="different classes"):
    sources.concatenate(lists)


@pytest.mark.parametrize(
  "name, content",
  [
    ("l.csv", b"path ,label \nd, e.mp4,walk\n".replace(b"d, e.mp4", b'"d, e.mp4"')),
    ("l.csv", b'"d, e.mp4",walk\n'),
    ("l.csv", b"d, e.mp4,walk \n"),
    ("l.txt", b'"d, e.mp4" walk\n'),
    ("l.csv", '"","path","label"\n"1","d, e.mp4","walk"\n'.encode("utf-16")),
    ("l.csv", "\ufeffpath;label\r\nd, e.mp4;walk\r\n".encode()),
    ("l.tsv", b"d, e.mp4\twalk\n"),
  ],
)
def test_lists_as_programs_export_them(tmp_path, name, content):
  (tmp_path / "d, e.mp4").write_bytes(b"x")
  (tmp_path / name).write_bytes(content)
  found = lists.open_videos(tmp_path / name)
  assert found.paths == [str(tmp_path / "d, e.mp4")] and found.classes == ["walk"]


def test_labels_with_spaces_around_are_one_class(tmp_path):
  for name in ("a", "f"):
    (tmp_path / f"{name}.mp4").write_bytes(b"x")
  (tmp_path / "l.csv").write_text("path,label\na.mp4,walk\nf.mp4,walk \n")
  assert lists.open_videos(tmp_path / "l.csv").classes == ["walk"]


@pytest.mark.parametrize("folder", ["", "riding a bike", "riding_a_bike", "train/riding a bike", "train"])
def test_kinetics_own_list(tmp_path, folder):
  (tmp_path / "train").mkdir()
  path = tmp_path / "train.csv"
  path.write_text("label,youtube_id,time_start,time_end,split\nriding a bike,-0x_y,7,17,train\n")
  file = tmp_path / folder / "-0x_y_000007_000017.mp4"
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(b"x")
  found = lists.open_videos(path)
  assert found.paths == [str(file)] and found.classes == ["riding a bike"]
  file.unlink()
  with pytest.raises(FileNotFoundError, match="-0x_y_000007_000017.mp4"):
    lists.open_videos(path)
  path.write_text("youtube_id,time_start,time_end,split\nx,7,17,test\n")
  with pytest.raises(ValueError, match="train.csv has Kinetics' columns without `label`"):
    lists.open_videos(path)
  path.write_text("label,youtube_id,time_start,time_end\na,x,seven,17\n")
  with pytest.raises(ValueError, match="train.csv, line 2: .*time_start 'seven'.*ID_000010_000020.mp4"):
    lists.open_videos(path)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"a.mp4 99999999\n", "label 99999999, but expected less than 100000"),
    (b"a.mp4 " + b"9" * 5000, "expected less than 100000"),
    (b"path,label\n../a.mp4,0\n", "line 2, has the file name '../a.mp4'.*allow_outside"),
    (b"/a.mp4 0\n", "line 1, has the file name"),
    (b"path,label\na.mp4,stra\xdfe\n", "line 2: is not UTF-8"),
    (b'path,label\n"a.mp4,0\n', "line 2: cannot be read"),
    (b"path,label\na.mp4,0,1\nb.mp4,1\n", "line 2: has 3 cells"),
  ],
)
def test_lists_that_cannot_be_used_name_the_line(tmp_path, content, message):
  (tmp_path / "l.csv").write_bytes(content)
  with pytest.raises(ValueError, match=f"l.csv(, | has the ).*{message}"):
    lists.open_videos(tmp_path / "l.csv")


def test_names_in_another_unicode_form(tmp_path):
  (tmp_path / "all" / "ö").mkdir(parents=True)
  (tmp_path / "all" / "ö" / "o\u0308.mp4").write_bytes(b"x")
  (tmp_path / "all" / "classes.json").write_text(json.dumps(["o\u0308"]))
  assert lists.open_videos(tmp_path / "all").labels.tolist() == [0]
  (tmp_path / "l.txt").write_text("all/o\u0308/ö.mp4 0\n")
  assert lists.open_videos(tmp_path / "l.txt").paths == [str(tmp_path / "all" / "ö" / "o\u0308.mp4")]


def test_lists_of_bug_reports():
  folder = paths.faults_dir("video_lists")
  found = lists.open_videos(folder / "header_space.csv")
  assert [path.rpartition("/")[2] for path in found.paths] == ["a.mp4", "f.mp4"]
  assert lists.open_videos(folder / "quoted_noheader.csv").paths[0].endswith("/d, e.mp4")
  assert lists.open_videos(folder / "strip.csv").classes == ["walk"]
