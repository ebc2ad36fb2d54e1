"""What a compiled training step may not do, on a mesh with fsdp > 1: for programs that are compiled for TPUs and GPUs.

trains_well(plan.step.as_text(), c, mesh)
"""

import math
import re

from alma_jax.llama.config import LlamaConfig
from alma_jax.plan import hlo


def trains_well(text, c: LlamaConfig, mesh):
  """Assert that a step gathers embedding and head in the dtype that computes, reduces no whole gradient of theirs over
  fsdp, and never branches. It computes in bf16, with the layers in a scan."""
  vocab = c.vocab // mesh.shape["tensor"]
  part = vocab * c.width // mesh.shape["fsdp"]
  for found in hlo.collectives(text):
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found.shape):
      sizes = [int(n) for n in dims.split(",") if n]
      if c.vocab in sizes or vocab in sizes:
        assert not (dtype == "f32" and found.kind == "all-gather"), f"a gather in fp32: {found}"
        # What is left of a gradient after its reduce-scatter is summed over `data`.
        whole = found.kind == "all-reduce" and math.prod(sizes) > part
        assert not whole, f"a gradient is reduced whole: {found}"
  assert " conditional(" not in text, "a step asks what a row holds while it runs"
