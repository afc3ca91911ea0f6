"""One training step of a tiny task on meshes of 8 virtual devices, compared with one device.

Run as a program, because the number of devices is fixed when jax starts: python -m tests.mesh_run
TASK[,TASK ...] [HEAD [BACKBONE [MESH ...]]], with meshes such as 4x2, where the optimizer is sharded.
It prints a line of JSON for each task: for each mesh what differs most.
"""

import dataclasses
import json
import sys

from flax import nnx
import jax
import numpy as np
import optax

from frozen_vision.backbones import families
from frozen_vision.devices import sharding
from frozen_vision.files import trees
from frozen_vision.heads import sampling
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from frozen_vision.training import step as step_lib
from tests import tiny, tiny_family

_OVERRIDES = {
  "tiny_conv": dict(channels=(16, 32, 64, 64)),
  "dinov3_vits16": dict(embed_dim=64, depth=4, num_heads=2, mlp_dim=128, registers=2),
}


def main(task_name: str, head: str = "", backbone: str = "", *meshes: str) -> None:
  config = _tiny_config(task_name, head, backbone)
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config, with_teacher=True)
  tx = optax.sgd(1.0, momentum=0.0)  # its state is the gradient itself, unlike a difference of parameters
  with task.train_batches(0) as batches:
    batch = step_lib.device_batch(next(batches))
  with task.eval_batches() as batches:
    example = step_lib.device_batch(next(batches))

  def run(
    mesh: jax.sharding.Mesh, over: str, optimizer: str = "replicated"
  ) -> dict[str, dict[str, np.ndarray]]:
    config.mesh.frozen, config.mesh.optimizer = over, optimizer
    placed = loop.build_model(task, config, mesh, with_teacher=True)
    with_key = dataclasses.replace(tasks_build.read_config(config), seed=3)
    state, layout = loop.initial_state(task, placed, tx, with_key, mesh)
    whole = sharding.replicated(mesh)
    step = step_lib.make_train_step(
      task,
      model.graphdef,
      tx,
      ema_decay=task.average_decay or config.ema_decay,
      averaged_teacher=task.averaged_teacher,
      frozen_pass=model.frozen_pass,
    )
    predict = step_lib.make_predict_step(task, model.graphdef, task.evaluations["val"].largest_size)
    with jax.set_mesh(mesh):
      on_mesh = sharding.put_batch(batch, mesh)
      new, scalars = jax.jit(step, out_shardings=(layout, whole))(state, placed.frozen, on_mesh)
      predictions = jax.jit(predict, out_shardings=sharding.batch_sharding(mesh))(
        state["trainable"], state["mutable"], placed.frozen, sharding.put_batch(example, mesh)
      )
      rois = (
        jax.jit(_selected_rois(task, model), out_shardings=whole)(state["trainable"], placed.frozen, on_mesh)
        if task_name == "detection"
        else {}
      )
    return dict(
      scalars=scalars,
      updated=trees.flatten(new["trainable"]),
      kept={
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path((new["task"], new.get("ema")))
      },
      gradients=trees.flatten(new["opt_state"][0].trace),
      predictions=predictions,
      rois=rois,
      held_bytes={
        "frozen": np.array(_held_bytes(placed.frozen)),
        "moments": np.array(_held_bytes(new["opt_state"])),
      },
    )

  def to_host(tree):
    return jax.tree.map(np.asarray, tree)

  wanted = to_host(run(sharding.make_mesh(1, 1, jax.devices()[:1]), "all"))
  report = {}
  for name in meshes or ("4x2", "2x4"):
    over = "model" if name == "2x4" else "all"
    optimizer = "sharded" if name == "4x2" else "replicated"
    found = to_host(run(sharding.make_mesh(*map(int, name.split("x"))), over, optimizer))
    report[name] = dict(
      scalars=_difference(found["scalars"], wanted["scalars"]),
      updated=_difference(found["updated"], wanted["updated"]),
      kept=_difference(found["kept"], wanted["kept"]),
      gradients=_difference(found["gradients"], wanted["gradients"]),
      predictions=_difference(found["predictions"], wanted["predictions"]),
      rois_equal=all(np.array_equal(found["rois"][name], value) for name, value in wanted["rois"].items()),
      num_rois=int(sum(np.sum(value) for name, value in wanted["rois"].items() if name == "positive")),
      **{
        f"{part}_share": float(held / max(wanted["held_bytes"][part], 1))
        for part, held in found["held_bytes"].items()
      },
    )
  print(json.dumps(report))


def _held_bytes(tree) -> int:
  """Bytes of a tree's arrays on the first device."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _tiny_config(task_name, head, backbone):
  """The config of a task, with the head and the backbone of these names where they are given."""
  config = tiny.get_config(task_name)
  config.batch_size = config.eval_batch_size = 8
  config.accumulate = 1
  if task_name == "self_distillation":  # its average is its teacher; passes of three sizes compile slowly
    backbone = backbone or "tiny_conv"
  else:
    config.ema_decay = 0.0
  if task_name == "detection":
    config.detection.head.name = "htc"
    two_stages = dict(
      stage_ious=(0.5, 0.6), stage_stds=((0.1,) * 4, (0.05,) * 4), stage_loss_weights=(1.0, 0.5)
    )
    config.detection.head.update(two_stages)
  if head:
    config[task_name].head.name = head
  if backbone:
    families.FAMILIES["tiny_family"] = tiny_family.FAMILY
    config.backbone.name = backbone
    config.backbone.overrides = _OVERRIDES[backbone]
    if task_name == "detection" and families.family_of(backbone) is families.FAMILIES["vit"]:
      config.detection.neck.name = "simple_pyramid"  # a plain ViT has one map
  return config


def _selected_rois(task, model):
  """The rois of the first stage and which are positive, as the loss of the step samples them."""

  def select(trainable, frozen, batch):
    module = nnx.merge(model.graphdef, trainable, frozen)
    head_rng, _ = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))
    _, roi_key = jax.random.split(head_rng)
    features = module.neck(task.features(module, batch, None))
    head = module.head
    proposals = head.rpn.proposals(
      head.rpn(features),
      batch["image_size"],
      pre_nms=head.config.train_pre_nms,
      count=head.config.train_proposals,
    )
    box_key, _ = jax.random.split(jax.random.fold_in(roi_key, 0))
    samples = head._sample(box_key, 0, proposals.boxes, proposals.valid, sampling.truth_of(batch))
    # Coordinates come from sums of floating point numbers: the indices of what was chosen are exact.
    return dict(gt_index=samples.gt_index, positive=samples.positive, valid=samples.valid)

  return select


def _difference(found: dict, wanted: dict) -> float:
  """The largest difference of any array, in parts of that array's largest magnitude.

  A key's bias moves all scores of a query alike, so its gradient is zero but for rounding: of arrays that are
  next to nothing beside the largest one, only that is compared.
  """
  assert found.keys() == wanted.keys()
  parts = [0.0]
  nothing = 1e-7 * max((np.abs(value.astype(np.float64)).max() for value in wanted.values()), default=0.0)
  for name, value in wanted.items():
    value, other = value.astype(np.float64), found[name].astype(np.float64)
    if max(np.abs(value).max(), np.abs(other).max()) <= nothing:
      continue
    scale = max(np.abs(value).max(), np.finfo(np.float32).tiny)
    parts.append(float(np.abs(value - other).max() / scale))
  return max(parts)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  tasks, *others = sys.argv[1:]
  for name in tasks.split(","):
    main(name, *others)
