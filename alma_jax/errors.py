"""UserError: a mistake that the user can mend. It is printed as one message; every other exception is a bug.

Its subclasses stand beside the code that raises them (DataError, ModelError, ...). `alma_jax.start` catches the base
class alone, so a new kind of mistake needs no list.
"""


class UserError(Exception):
  """Its text is the whole message: what is wrong, where, and how to mend it."""


class RunError(UserError):
  """About a run directory or an artefact in it."""


class NotFinite(UserError):
  """A model or a judge gave NaN or infinity. `item` is the index of the first row that it gave one for."""

  def __init__(self, item: int, message: str) -> None:
    super().__init__(message)
    self.item = item
