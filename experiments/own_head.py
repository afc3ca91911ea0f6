import frozen_vision as fv, jax, numpy as np, optax
from flax import nnx
from frozen_vision.data.generated.scenes import SceneSource
scenes = list(SceneSource(32, image_size=64))
images = fv.normalise(np.stack([scene["image"] for scene in scenes]))
shown = np.stack([np.isin(np.arange(6), scene["labels"]) for scene in scenes])  # which of six shapes
backbone = fv.fold_backbone(fv.load_backbone("swinv2_nano"))
head = nnx.Linear(backbone.feature_specs[-1].channels, 6, rngs=nnx.Rngs(0))  # any module of your own
optimizer = optax.adam(1e-2)
slots = optimizer.init(head)
@jax.jit
def step(head, slots, backbone):
  pooled = backbone(images)[-1].mean((1, 2))
  loss = lambda head: optax.sigmoid_binary_cross_entropy(head(pooled), shown).mean()
  value, gradient = jax.value_and_grad(loss)(head)  # of the head alone
  updates, slots = optimizer.update(gradient, slots)
  return optax.apply_updates(head, updates), slots, value
for number in range(30):
  head, slots, value = step(head, slots, backbone)
  print(f"step {number + 1}: loss {value:.3f}")
