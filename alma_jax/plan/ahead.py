"""What a run that starts will take, in a line: the quick plan's totals for the devices at hand.

  for line in lines(session): ...     # nothing where the devices' peak rates are not known (CPUs)

It compiles nothing and takes a fraction of a second. Lengths and counts are assumed as `alma plan` assumes them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from alma_jax.errors import free_bytes
from alma_jax.plan import recipes
from alma_jax.plan.assumptions import Given, assumptions
from alma_jax.plan.estimate import estimated
from alma_jax.plan.machine import Machine
from alma_jax.plan.table import GB, Plan
from alma_jax.plan.topology import CHIPS, Topology
from alma_jax.runtime.session import Session

# The word of CHIPS for what JAX calls a device
KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA H100 80GB HBM3": "h100",
}


def lines(s: Session[Any]) -> Iterator[str]:
  """The totals, and a line where the disk is short."""
  here = topology_of(jax.devices())
  if here is None:
    return
  o, c = s.options, s.host.trained_config
  found = assumptions(Given(), None, recipes.defaults(s.by_round))
  machine = Machine(here, c, o.mesh, o.engine, o.model, found)
  plan = Plan(machine, [estimated(machine, task) for task in recipes.works(s.by_round, found, c.width)])
  yield (
    f"planned by roofline for {here.devices} x {here.chip.name}: {plan.hours:,.3g} hours, {plan.device_hours:,.4g}"
    f" device-hours, up to {plan.disk / GB:,.3g} GB of disk; `alma plan` says more"
  )
  misfits = sorted({step.work.stage.rpartition("/")[2] for step in plan.steps if not step.fits})
  if misfits:
    yield f"planned by roofline: {', '.join(misfits)} may not fit these devices; `alma plan` says what would help"
  there = free_bytes(s.run.dir) + sum(path.stat().st_size for path in s.run.dir.rglob("*") if path.is_file())
  if plan.disk > there:
    yield f"{s.run.dir}: the run takes up to {plan.disk / GB:,.3g} GB, and {there / GB:,.3g} GB are there for it"


def topology_of(devices: Sequence[Any]) -> Topology | None:
  """The Topology of all hosts' devices; None where their rates are not known."""
  kind = KINDS.get(devices[0].device_kind)
  if kind is None or any(device.device_kind != devices[0].device_kind for device in devices):
    return None
  hosts = len({device.process_index for device in devices})
  return Topology(f"{kind} here", CHIPS[kind], len(devices), hosts)
