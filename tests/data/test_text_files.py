"""Text that other programs export, and class lists."""

import json
import re

import pytest

from frozen_vision.data import classes, names, text_files

_TEXT = "straße\nhaus, klein\n"


@pytest.mark.parametrize(
  "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"], ids=str
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
  path = tmp_path / "list.txt"
  path.write_bytes(_TEXT.replace("\n", end).encode(encoding))
  assert text_files.read_text(path) == _TEXT
  assert text_files.read_lines(path) == [(1, "straße"), (2, "haus, klein")]


def test_other_encodings_are_refused_with_the_line(tmp_path):
  path = tmp_path / "list.txt"
  path.write_bytes("haus\nstraße\n".encode("latin-1"))
  with pytest.raises(
    text_files.TextError, match=r"list.txt, line 2: is not UTF-8.*0xdf.*'ß' in Latin-1.*iconv"
  ):
    text_files.read_text(path)
  path.write_bytes("haus\n".encode("utf-16") + b"\x00\xd8\x41\x00")
  with pytest.raises(text_files.TextError, match="list.txt, line 2: is damaged UTF-16"):
    text_files.read_text(path)
  path.write_bytes(b"a\nb\0\n")
  with pytest.raises(text_files.TextError, match="list.txt, line 2: has a zero byte"):
    text_files.read_text(path)
  path.write_bytes(b"a" * 100)
  with pytest.raises(text_files.TextError, match="has 100 bytes, more than the 99"):
    text_files.read_text(path, max_bytes=99)
  with pytest.raises(text_files.TextError, match="cannot be read"):
    text_files.read_text(tmp_path / "absent.txt")
  with pytest.raises(text_files.TextError, match="is no file"):
    text_files.read_text(tmp_path)


@pytest.mark.parametrize(
  "content, message",
  [
    ('{"a": 1,\n "b" 2}', "line 2, column 6: not valid JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("1" * 10_000, "not valid JSON"),
    ("", "line 1, column 1"),
  ],
  ids=["syntax", "depth", "digits", "empty"],
)
def test_json_errors_name_file_and_line(tmp_path, content, message):
  path = tmp_path / "a.json"
  path.write_text(content)
  with pytest.raises(text_files.TextError, match=f"a.json.*{message}"):
    text_files.read_json(path)


@pytest.mark.parametrize(
  "text",
  [
    "path,label\na.mp4,x\n",
    " Path , LABEL \n a.mp4 , x \n",
    "path;label\n\na.mp4;x\n",
    'path\tlabel\n"a.mp4"\tx\n',
    '"","path","label"\n"1","a.mp4","x"\n',  # R: write.csv
    '"path","label"\n"1","a.mp4","x"\n',  # R: write.table(sep=",")
    "other,path,label\n,a.mp4,x\n",
  ],
)
def test_tables(tmp_path, text):
  path = tmp_path / "a.csv"
  path.write_text(text)
  table = text_files.read_table(path, ["path", "label"])
  assert [(row.cells["path"], row.cells["label"]) for row in table.rows] == [("a.mp4", "x")]


def test_tables_that_cannot_be_read(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("a.mp4,x\n")
  assert text_files.read_table(path, ["path"]) is None
  for text, message in (
    ('path,label\n"a,x\n', "line 2: cannot be read"),
    ("path,label\nb,x\na, b,x\n", "line 3: has 3 cells, and the first line names 2 columns; put names"),
    ("path,label,path\n", "line 1: names the column 'path' twice"),
  ):
    path.write_text(text)
    with pytest.raises(text_files.TextError, match=f"a.csv, {message}"):
      text_files.read_table(path, ["path", "label"])


@pytest.mark.parametrize(
  "value, expected",
  [
    (3, 3),
    (3.0, 3),
    (" 7 ", 7),
    (True, None),
    (3.5, None),
    (float("nan"), None),
    (1e300, None),
    (10**400, None),
  ]
  + [("9" * 30, None), ("", None), ("٣", None), (None, None), ([], None), (11, None), (-1, None)],
)
def test_whole_numbers(value, expected):
  assert text_files.whole_number(value, 0, 10) == expected


def test_class_lists(tmp_path):
  path = tmp_path / "classes.json"
  path.write_bytes(json.dumps(["a ", "b"]).encode("utf-16"))
  assert classes.read_classes(path) == ["a", "b"] == classes.find_classes(tmp_path / "none", tmp_path)
  assert classes.find_classes(tmp_path / "none") is None
  for content, message in (
    ({}, "must hold a JSON list of class names; found a JSON object"),
    (["a", 1], "entry 1 is '1'"),
    (["a", " "], "entry 1"),
    (["a", "a "], "names the class 'a' twice"),
    ([], "has 0 class names"),
  ):
    path.write_text(json.dumps(content))
    with pytest.raises(text_files.TextError, match=f"classes.json.*{message}"):
      classes.read_classes(path)
  assert classes.numbers(["gro\u0308ße", "x", "größe"], ["y", "größe"]) == [1, None, 1]


@pytest.mark.parametrize(
  "found, message",
  [
    (["a", "b"], None),
    (["b", "a"], "the same names in another order .class 0 is 'b', expected 'a'"),
    (["a", "b", "c"], "3 classes in place of 2: it adds 'c'"),
    (["a"], "1 classes in place of 2: it lacks 'b'"),
    (["a", "c"], "lacks 'b' and adds 'c'"),
    ([{"name": "a", "id": 1}, {"name": "b", "id": 2}], None),
  ],
)
def test_differences_between_class_lists(found, message):
  difference = classes.difference(["a", "b"], found)
  assert difference is None if message is None else re.search(message, difference)


def test_other_ids_are_a_difference():
  one, other = ([{"name": "a", "id": 1}], [{"name": "a", "id": 7}])
  assert "has the id 7, expected 1" in classes.difference(one, other)
  assert classes.difference(one, ["a"]) is None


def test_names_in_another_unicode_form(tmp_path):
  composed, decomposed = "größe.png", "gro\u0308ße.png"
  (tmp_path / "söb").mkdir()
  (tmp_path / "söb" / decomposed).touch()
  files = names.Files(tmp_path)
  assert files.find(f"so\u0308b/{composed}") == tmp_path / "söb" / decomposed
  assert files.find("söb/absent.png") is None and files.find("absent/a.png") is None
  both = names.Lookup([composed, decomposed])
  assert both.find(composed) == composed and both.find(decomposed) == decomposed
  # Two files of one form, neither of them spelled as asked: none is taken.
  assert names.Lookup(["a\u0323\u0307", "a\u0307\u0323"]).find("\u1ea1\u0307") is None


@pytest.mark.parametrize(
  "name", ["../a.png", "a/../../b", "/etc/passwd", "C:\\x", "a\\..\\b", "", "a\0b", "\\\\host"]
)
def test_names_that_lead_outside(name):
  with pytest.raises(names.OutsideError, match="list.csv has the file name .*allow_outside"):
    names.require_inside(name, "list.csv", allow_outside=False)
  with pytest.raises(names.OutsideError, match="below the folder. Get the file again, or correct the name.$"):
    names.require_inside(name, "list.csv")
  written = names.output_name(name)
  assert not names.leads_outside(written), written
  if name and "\0" not in name:
    assert names.require_inside(name, "list.csv", allow_outside=True) == name


def test_output_names_are_short_and_ordinary_ones_stay():
  for name in ("a", "a b/c.d", "größe/x", "...", "a..b"):
    assert names.output_name(name) == name
  long = names.output_name("x" * 5000 + "/" + "ß" * 5000)
  assert all(len(part.encode()) <= 200 for part in long.split("/"))
  assert names.output_name("x" * 5000) != names.output_name("x" * 5001)
