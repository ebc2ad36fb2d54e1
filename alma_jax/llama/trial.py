"""The check of a kernel on the device at hand, before its first use."""

import concurrent.futures
from collections.abc import Callable

import jax


def flaw_on(platform: str, check: Callable[[], str | None]) -> str | None:
  """Why a kernel cannot be used on the devices of a platform: what `check` says on the first one here, or the error
  that it ends in. None if it finds nothing, or if no such device is here, because the program is then compiled for
  another machine."""
  try:
    device = jax.local_devices(backend=platform)[0]
  except RuntimeError:
    return None

  def checked() -> str | None:
    with jax.default_device(device):
      return check()

  with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:  # the caller may be tracing; in a thread this runs now
    try:
      return elsewhere.submit(checked).result()
    except Exception as e:  # private APIs and drivers fail in their own ways; the work must go on
      return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"
