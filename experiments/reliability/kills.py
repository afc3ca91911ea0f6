"""Kills runs at random moments of their life, continues them, and compares them with one that nobody killed.

  JAX_PLATFORMS=cpu PYTHONPATH=. python experiments/reliability/kills.py --kills=100 --seed=0

Runs of a tiny classifier with a checkpoint after every step, in three variants that take turns: alone, with
two loader processes (killed together with the run, or left without it), and as two processes of which one,
or the launcher, is killed. A chain of kills ends with a run that comes to its end. It must have lost
nothing: the arrays of its last checkpoint and every line of its log are those of the undisturbed run, bit
for bit (of two processes compared with two). No process and no shared memory may be left behind.
"""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

from absl import flags

from experiments.reliability import campaign
from tests import comparing, left_behind, tiny

_KILLS = flags.DEFINE_integer("kills", 100, "Kills over all variants.")
_CHAIN = flags.DEFINE_integer("chain", 5, "Kills before a run may come to its end.")
_MINUTES = flags.DEFINE_float("minutes", 0.0, "Begin no chain after so long; 0 for no limit.")
_VARIANTS = flags.DEFINE_list("variants", ["alone", "workers", "two processes"], "Which.")
_STEPS = 30
_STEP = re.compile(r"step +(\d+)/")
_MARK = "FROZEN_VISION_KILLS"


def command(workdir: pathlib.Path, images: pathlib.Path, variant: str) -> list[str]:
  """The run of a variant in a workdir."""
  train = [
    *(sys.executable, "-m", "frozen_vision.main", "--config=tests/tiny.py:classification"),
    f"--workdir={workdir}",
    f"--config.classification.train={images}",
    f"--config.classification.validation={images}",
    f"--config.steps={_STEPS}",
    "--config.checkpoint_every=1",
    "--config.log_every=1",
    f"--config.loader.workers={2 if variant == 'workers' else 0}",
  ]
  if variant != "two processes":
    return train
  return [sys.executable, "-m", "frozen_vision.distributed", "--processes=2", "--", *train, "--distributed"]


class Chains:
  """Chains of kills in a folder, with what went wrong."""

  def __init__(self, folder: pathlib.Path, rng: random.Random):
    self.folder, self.rng = folder, rng
    self.images = tiny.image_folder(folder / "images")
    self.whole: dict[str, tuple] = {}
    self.counts: dict[str, dict[str, int]] = {}
    self.faults: list[str] = []

  def start(self, workdir: pathlib.Path, variant: str, mark: str) -> subprocess.Popen:
    environment = os.environ | {_MARK: mark, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}
    if variant == "two processes":
      environment |= {"NPROC": "8", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
      command(workdir, self.images, variant),
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )

  def finish(self, workdir: pathlib.Path, variant: str, mark: str) -> tuple | None:
    process = self.start(workdir, variant, mark)
    output = process.communicate(timeout=600)[0]
    if process.returncode:
      self.faults.append(f"{variant}: ended with {process.returncode}: {output[-600:]}")
      return None
    return comparing.checkpoint(workdir), comparing.log_lines(workdir)

  def kill_once(self, workdir: pathlib.Path, variant: str, mark: str) -> str:
    """Starts a run, kills it at a random moment, and says in which part of its life that was."""
    process = self.start(workdir, variant, mark)
    moment, started = self.rng.choice(["start-up", "steps", "steps", "steps"]), time.monotonic()
    steps, delay = self.rng.randint(1, 6), self.rng.uniform(0, 0.3)
    if moment == "start-up":
      time.sleep(self.rng.uniform(0, 6))
    else:
      seen = 0
      for line in process.stdout:
        seen += bool(_STEP.search(line))
        if seen >= steps or time.monotonic() - started > 300:
          break
      time.sleep(delay)
    if process.poll() is not None:
      moment = "after its end"
    children = left_behind.marked(f"{_MARK}={mark}")
    victim = process.pid
    if variant == "two processes" and self.rng.random() < 0.7 and len(children) > 1:
      victim = self.rng.choice([child for child in children if child != process.pid])
    try:
      if variant == "workers" and self.rng.random() < 0.5:
        os.killpg(process.pid, signal.SIGKILL)
      else:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
      pass
    left = left_behind.wait_until_none(lambda: left_behind.marked(f"{_MARK}={mark}"), 60)
    process.communicate()
    if left:
      self.faults.append(f"{variant}: {len(left)} processes live on 60 s after a kill during {moment}")
    return moment

  def chain(self, variant: str, number: int, kills: int) -> None:
    """Kills a run again and again, then lets it end and compares it."""
    counts = self.counts.setdefault(variant, {"chains": 0, "kills": 0, "start-up": 0, "steps": 0, "equal": 0})
    if variant not in self.whole:
      self.whole[variant] = self.finish(self.folder / f"{variant}-whole", variant, f"{os.getpid()}-whole;")
    workdir, mark = self.folder / f"{variant}-{number}", f"{os.getpid()}-{number};"
    for _ in range(kills):
      moment = self.kill_once(workdir, variant, mark)
      counts["kills"] += moment != "after its end"
      counts[moment] = counts.get(moment, 0) + 1
    found = self.finish(workdir, variant, mark)
    counts["chains"] += 1
    if found is not None and found == self.whole[variant]:
      counts["equal"] += 1
    elif found is not None:
      self.faults.append(f"{variant}: chain {number} ended otherwise than the undisturbed run")
    left = left_behind.segments(workdir)
    if left:
      self.faults.append(f"{variant}: {len(left)} segments of shared memory are left")


def main() -> None:
  started, number, left = time.monotonic(), 0, _KILLS.value
  with tempfile.TemporaryDirectory() as folder:
    chains = Chains(pathlib.Path(folder), campaign.generator())
    while left > 0 and not (_MINUTES.value and time.monotonic() - started > 60 * _MINUTES.value):
      kills = min(left, _CHAIN.value)
      chains.chain(_VARIANTS.value[number % len(_VARIANTS.value)], number, kills)
      number, left = number + 1, left - kills
  total = sum(counts["kills"] for counts in chains.counts.values())
  lines = [
    f"  {variant:14s} " + ", ".join(f"{name} {count}" for name, count in counts.items())
    for variant, counts in chains.counts.items()
  ]
  campaign.finish(campaign.headline(f"{total} kills in {number} chains"), lines, chains.faults)


if __name__ == "__main__":
  campaign.run(main)
