"""The miniature world: a true oracle, a small base model, and human data for a run's seed."""

import pathlib

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
