"""The page of a report: what it says of cells that were never run, and how a browser shows it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
from PIL import Image
import pytest

from frozen_vision.files import atomic
from frozen_vision.report import page, svg, tables, words, write
from tests.report import reports

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class _Reader(html.parser.HTMLParser):
  """Elements that are open, and what each kind was found with."""

  EMPTY = ("meta", "img", "link", "br")

  def __init__(self):
    super().__init__()
    self.open, self.found = [], []

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, dict(attributes)))
    if tag not in self.EMPTY:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.found.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def _read(text):
  reader = _Reader()
  reader.feed(text)
  assert not reader.open
  return reader.found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A report of three seeds whose second backbone is better everywhere."""
  asked = reports.plan(tmp_path_factory.mktemp("report"), seeds=3)
  reports.fill(asked, gain=0.2)
  return asked, write.write(asked)


def test_three_files_say_the_same(workdir):
  asked, report = workdir
  assert json.loads((asked.workdir / "report.json").read_text()) == json.loads(json.dumps(report))
  page_text, text = ((asked.workdir / name).read_text() for name in ("report.html", "report.md"))
  cell = report["scores"]["probes/linear"]["other"]
  assert cell["mean"] == pytest.approx(1.003) and cell["by_seed"]["2"] == pytest.approx(1.006)
  interval = f"({cell['low']:.3f} to {cell['high']:.3f})"
  assert interval in page_text and interval in text
  for shown in (
    "26 of 26 cells are finished",
    "Mean ranks",
    "an end of the grid",
    "12,345",
    "1.00 (1.00 to 1.00)",
    "advantage of the first over the second",
    "swinv2_nano over other",
  ):
    assert shown in page_text and shown in text, shown
  assert report["mean_ranks"]["other"]["mean"] == 1 and report["ranked_rows"] == 8
  won = [each for each in report["comparisons"] if each["winner"]]
  assert won and {each["winner"] for each in won} == {"other"}
  assert "neither" in text and "not among --tasks" in text and "makes them apart" in text


def test_a_backbone_against_itself_wins_nothing(tmp_path):
  asked = reports.plan(tmp_path, seeds=3)
  reports.fill(asked)
  report = tables.collect(asked)
  assert len(report["comparisons"]) == 8 and not any(each["winner"] for each in report["comparisons"])
  assert {rank["mean"] for rank in report["mean_ranks"].values()} == {1.5}


def test_the_page_is_made_from_what_is_there(tmp_path):
  asked = reports.plan(tmp_path, seeds=2)
  names = ("other/detection/1", "other/card/0", "swinv2_nano/action/0", "swinv2_nano/action/1")
  reports.fill(asked, without=names)
  folder = asked.folder(asked.cell("other/detection/1"))
  folder.mkdir(parents=True)
  atomic.write_json(folder / "error.json", {"error": "The disk <is> full."})
  report = write.write(asked)
  states = {each["cell"]: each["state"] for each in report["absent"]}
  assert states == dict.fromkeys(names, "missing") | {"other/detection/1": "failed"}
  text = (tmp_path / "report.html").read_text()
  _read(text)
  assert "The disk &lt;is&gt; full" in text and "<is>" not in text and "no score" in text
  assert "<" not in (tmp_path / "report.md").read_text()
  assert list(report["scores"]["action/top1"]) == ["other"] and report["ranked_rows"] == 7
  # Of a report of which nothing has been run there is a page, too.
  nothing = reports.plan(tmp_path / "nothing", seeds=1)
  report = write.write(nothing)
  assert report["cells"] == {"finished": 0, "stale": 0, "failed": 0, "missing": 10}
  _read((tmp_path / "nothing" / "report.html").read_text())


def test_the_table_of_trained_heads_says_which_stride_was_chosen():
  run = dict(
    task="Detection", trained_parameters=5, steps=2, batch_size=3, optimizer="sgd", learning_rate=0.1
  )
  found = [
    run | dict(backbone="a", stride=None, seconds=90.0),
    run | dict(backbone="a", stride=None, seconds=None),  # a run that was continued
    run | dict(backbone="b", stride=16, seconds=None),
  ]
  rows = words.runs({"runs": found})
  assert [row[1] for row in rows] == ["a", "b (at stride 16)"]
  assert [row[-1] for row in rows] == ["1.5", "–"]


def test_a_stale_cell_is_named_and_left_out(workdir):
  asked, _ = workdir
  changed = reports.plan(asked.workdir, seeds=3, options=["action:steps=7"])
  report = tables.collect(changed)
  assert {each["cell"].split("/")[1] for each in report["absent"]} == {"action"}
  assert all("config.steps was 200 and is 7" in each["reason"] for each in report["absent"])
  assert "action/top1" not in report["scores"] and "probes/knn" in report["scores"]


def test_the_page_needs_nothing_but_itself(workdir):
  asked, _ = workdir
  text = (asked.workdir / "report.html").read_text()
  found = _read(text)
  for tag, attributes in found:
    for name in ("src", "href", "xlink:href"):
      assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,")), (tag, attributes)
    assert tag not in ("script", "link", "iframe", "object"), tag
  assert "url(" not in text and "@import" not in text and "http" not in re.sub(r"base64,[^\"]+", "", text)
  pictures = [attributes for tag, attributes in found if tag == "img"]
  assert len(pictures) == 2 and all(each["alt"].startswith("Predictions: Action") for each in pictures)


def test_the_page_is_read_by_keyboard_and_without_colours(workdir):
  asked, report = workdir
  found = _read((asked.workdir / "report.html").read_text())
  ids = {attributes["id"] for _, attributes in found if "id" in attributes}
  links = {attributes["href"][1:] for tag, attributes in found if tag == "a"}
  assert links <= ids and {"scores", "wins", "absent"} <= links
  regions = [attributes for _, attributes in found if attributes.get("class") == "scroll"]
  assert regions and all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
  assert all(attributes["scope"] in ("row", "col") for tag, attributes in found if tag == "th")
  charts = [attributes for tag, attributes in found if tag == "svg" and "role" in attributes]
  assert len(charts) > 10 and all(each["role"] == "img" and each["aria-label"] for each in charts)
  # Two series of a chart differ in shape and dash, and carry their names.
  assert len({re.sub(r"s\d", "", svg.marker(place, 0, 0)) for place in range(6)}) == 6
  points = [svg.Point(1.0, 1.0), svg.Point(2.0, 2.0)]
  drawn = svg.chart({"one": points, "two": points}, svg.Axis("x"), svg.Axis("y"), description="d", lines=True)
  assert ">one</text>" in drawn and ">two</text>" in drawn and drawn.count("stroke-dasharray") == 1
  style = page._STYLE.read_text()
  assert "prefers-color-scheme: dark" in style and ":focus-visible" in style
  colours = re.findall(r"--(\w+): #(\w+);", style)
  assert len({name for name, _ in colours}) * 2 == len(colours)  # every colour has a dark and a light value


def test_charts_leave_out_what_an_axis_cannot_show():
  axes = svg.Axis("x", log=True), svg.Axis("y")
  assert svg.chart({"a": [svg.Point(0.0, 1.0)]}, *axes, description="d") == ""
  drawn = svg.chart({"a<b": [svg.Point(1e6, 1.0, 0.5, 1.5)]}, *axes, description="d")
  # Names stand in the order of their points, one under the other.
  close = {"low": [svg.Point(1, 1)], "high": [svg.Point(1, 1.01)], "far": [svg.Point(1, 9)]}
  texts = re.findall(r'class="name"[^>]* y="([\d.]+)"[^>]*>(\w+)<', svg.chart(close, *axes, description="d"))
  assert [name for _, name in texts] == ["far", "high", "low"]
  heights = [float(height) for height, _ in texts]
  assert min(np.diff(heights)) >= 12
  assert "a&lt;b" in drawn and ">1M</text>" in drawn and "nan" not in drawn
  assert [svg.number(value) for value in (0, 3_413_024, 1.07e9, 57.2, 1e-6)] == [
    "0",
    "3.41M",
    "1.07G",
    "57.2",
    "1e-06",
  ]


@pytest.mark.skipif(_CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_scrolling_sideways(workdir, tmp_path, width):
  """Inside a frame of the width of a screen, nothing but the tables is wider than it."""
  asked, _ = workdir
  frame = tmp_path / "frame.html"
  frame.write_text(
    f'<body style="margin:0;background:#f0f"><iframe style="border:0;width:{width}px;height:2600px" '
    f'src="{(asked.workdir / "report.html").as_uri()}"></iframe></body>'
  )
  picture = tmp_path / "page.png"
  command = [_CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
  command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,2600", f"--screenshot={picture}"]
  subprocess.run([*command, frame.as_uri()], check=True, timeout=120, capture_output=True)
  pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
  inside, outside = pixels[:, :width], pixels[:, width:1400]
  assert (outside == (255, 0, 255)).all(axis=-1).mean() > 0.99
  background = inside[5, 2]
  drawn = (np.abs(inside - background).sum(axis=-1) > 60).any(axis=0)
  assert drawn.mean() > 0.5  # there is text all over its width
  assert not drawn[-6:].any() and not drawn[:6].any()  # and none is cut off at its edges
