"""What distillation changes inside: how far heads look, and how flat the loss is around tuned weights.

  PYTHONPATH=. python experiments/frozen_study/explain.py --workdir=/tmp/study --weights=WEIGHTS --data=FOLDER

Two statements of feature distillation (arXiv 2205.14141, figures 2 to 4) are tested on the cells of the grid
`pretraining_tuned`, which must be finished: (c) the attention distances of heads spread after distillation,
measured on test images of CIFAR-10 at 64 px, and (d) the loss of the fine-tuned classifier rises less under
noise on its weights. Each is compared between a teacher and what was distilled from it, paired over batches
of images, or over seeds. Measurements are kept in WORKDIR/explained; `explain.md` stands beside the pages.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.frozen_study import plans
from experiments.frozen_study import run as run_lib
from frozen_vision import fine_tune
from frozen_vision.config import Config
from frozen_vision.data.classification import augment, folders
from frozen_vision.diagnostics import attention, landscape
from frozen_vision.files import atomic
from frozen_vision.report import cells, statistics
from frozen_vision.runs import checkpoints
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import common
from frozen_vision.training import loop
from frozen_vision.training import step as train_step

GRID = "pretraining_tuned"
# (teacher, what was distilled from it), by label.
PAIRS = (
  ("swinv2_nano", "swinv2_nano_fd"),
  ("swinv2_nano_moco", "swinv2_nano_moco_fd"),
  ("swinv2_nano_simmim", "swinv2_nano_simmim_fd"),
)
_SIDE, _BATCH, _BATCHES = 64, 8, 16
_IMAGES = 200  # that the loss is measured on
_DISTANCES = (-0.5, -0.25, 0.0, 0.25, 0.5)
_DIRECTIONS = 3


def spread(heads: Sequence[attention.Heads]) -> float:
  """Standard deviation in pixels over the heads of a block, averaged over the later half of the blocks."""
  deep = [block for block in heads[len(heads) // 2 :] if len(block.distances) > 1]
  return float(np.mean([np.std(block.distances) for block in deep]))


def attention_spreads(
  plan: cells.Plan, label: str, test: folders.ImageFolder | folders.ImageTar
) -> list[float]:
  """`spread` of a pretrained backbone on every batch of images."""
  entry = next(each for each in plan.backbones if each.label == label)
  backbone = common.load_backbone(entry.options, 0)
  transform = augment.EvalTransform(_SIDE)
  picked = np.linspace(0, len(test) - 1, _BATCH * _BATCHES).astype(int)
  images = np.stack([transform(test[int(index)])["image"] for index in picked])
  batches = images.reshape(-1, _BATCH, *images.shape[1:])
  return [spread(attention.measure(backbone, [backbone.preprocessing.normalise(x)])) for x in batches]


def loss_rise(config: Config, folder: pathlib.Path) -> list[float]:
  """By how much the test loss of a fine-tuned classifier rises under noise, at the outermost distances.

  Args:
    config: of the cell; the run that was selected lies below `folder`/test.

  Returns:
    The mean over both signs, of every direction of noise.
  """
  found = json.loads((folder / "fine_tuning.json").read_text(encoding="utf-8"))
  best = found["selected"]
  run = fine_tune.point(config, best["learning_rate"], best["weight_decay"])
  run = run.replace({"classification.refit": True})
  task = tasks_build.build_task(run)
  model = loop.build_model(task, run)
  tested = folder / "test" / fine_tune.run_name(best["learning_rate"], best["weight_decay"])
  with checkpoints.Checkpoints(str(tested)) as kept:
    trainable, mutable, _ = kept.restore_evaluated(model.trainable, model.mutable, averaged=run.ema_decay > 0)
  predict = train_step.make_predict_step(task, model.graphdef, task.evaluations["val"].largest_size)
  collected: list[dict[str, Any]] = []
  with task.eval_batches() as stream:
    for batch in stream:
      collected.append(train_step.device_batch(batch))
      if sum(len(each["label"]) for each in collected) >= _IMAGES:
        break

  def loss(parameters: nnx.State) -> jax.Array:
    total = 0.0
    for batch in collected:
      logits = predict(parameters, mutable, model.frozen, batch)["logits"]
      chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch["label"])[:, None], axis=-1)
      total -= chosen.mean()
    return total / len(collected)

  losses = landscape.along(loss, trainable, jax.random.key(0), distances=_DISTANCES, directions=_DIRECTIONS)
  middle = losses[:, len(_DISTANCES) // 2]
  return ((losses[:, 0] + losses[:, -1]) / 2 - middle).tolist()


def measure(plan: cells.Plan, folder: pathlib.Path, parts: pathlib.Path) -> dict[str, Any]:
  """{label: `spreads` by batch, `rises` by seed} of what is finished; each is measured once."""
  labels = [label for pair in PAIRS for label in pair]
  present = [entry for entry in plan.backbones if entry.label in labels]
  test = folders.ImageTar(parts / "test.tar") if present else None
  found: dict[str, Any] = {}
  for entry in present:
    own = found[entry.label] = {"rises": {}}
    own["spreads"] = _kept(
      folder / f"{entry.label}_{entry.weights[:12]}_attention.json",
      lambda entry=entry: attention_spreads(plan, entry.label, test),
    )
    for seed in plan.seeds:
      cell = cells.Cell(entry, "tuned_cifar10", seed)
      if cells.look(plan, cell).state == "finished":
        own["rises"][seed] = _kept(
          folder / f"{entry.label}_{entry.weights[:12]}_landscape_{seed}.json",
          lambda cell=cell: loss_rise(plan.config(cell), plan.folder(cell)),
        )
  return found


def _kept(path: pathlib.Path, compute: Any) -> list[float]:
  if not path.is_file():
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, compute())
  return json.loads(path.read_text(encoding="utf-8"))


def render(found: Mapping[str, Any]) -> str:
  """The Markdown of both statements."""
  lines = [
    "# What feature distillation changes inside",
    "",
    "Intervals are of 95%, by Student's t over paired batches of 8 images (c), or over seeds (d), not "
    "corrected for their number. An interval that holds zero decides nothing.",
    "",
    "| statement | teacher | before | after | difference | verdict |",
    "|---" * 6 + "|",
  ]
  for teacher, student in PAIRS:
    if teacher in found and student in found:
      lines.append(_line("(c) heads' distances spread, px", teacher, found, student, "spreads"))
      lines.append(_line("(d) the loss rises less under noise", teacher, found, student, "rises"))
  return "\n".join(lines) + "\n"


def _line(text: str, teacher: str, found: Mapping[str, Any], student: str, what: str) -> str:
  before, after = _by_unit(found[teacher][what]), _by_unit(found[student][what])
  common_units = sorted(set(before) & set(after))
  if not common_units:
    return f"| {text} | {teacher} | – | – | – | not measured |"
  differences = {unit: after[unit] - before[unit] for unit in common_units}
  result = statistics.estimate(statistics.Scores(by_seed=differences))
  expected = 1 if what == "spreads" else -1
  if not result.low == result.low or result.low <= 0 <= result.high:
    verdict = "open"
  else:
    verdict = "seen" if result.mean * expected > 0 else "the opposite is seen"
  means = [np.mean([values[unit] for unit in common_units]) for values in (before, after)]
  return (
    f"| {text} | {teacher} | {means[0]:.3g} | {means[1]:.3g} | {result.mean:+.3g} "
    f"({result.low:.3g} to {result.high:.3g}) | {verdict} |"
  )


def _by_unit(values: Any) -> dict[int, float]:
  """Numbers by batch, or the mean over directions by seed."""
  if isinstance(values, Mapping):
    return {int(seed): float(np.mean(each)) for seed, each in values.items()}
  return dict(enumerate(values))


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line."""

  given = list(sys.argv[1:] if arguments is None else arguments)
  asked = run_lib.read_arguments([f"--grid={GRID}", *given])
  plan, _ = plans.make_plan(GRID, asked)
  text = render(measure(plan, asked.workdir / "explained", asked.workdir / "parts"))
  out = asked.out or asked.workdir / "pages"
  out.mkdir(parents=True, exist_ok=True)
  atomic.write_text(out / "explain.md", text)
  print(text)
  return 0


if __name__ == "__main__":
  sys.exit(main())
