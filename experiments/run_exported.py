"""Runs what frozen_vision.export wrote, without frozen_vision: run_exported.py PROGRAM IMAGES.npy OUT.npz"""
import sys, jax, jax.export, numpy as np, safetensors.flax
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
weights = safetensors.flax.load_file(sys.argv[1] + ".safetensors")
images = np.load(sys.argv[2])  # uint8, of the shape that the program was exported for
sizes = np.tile(np.array(images.shape[-3:-1], np.int32), (len(images), 1))  # content: all of it
outputs = jax.jit(program.call)(weights, images, sizes)
np.savez(sys.argv[3], **{f"{head}.{name}": x for head, found in outputs.items() for name, x in found.items()})
