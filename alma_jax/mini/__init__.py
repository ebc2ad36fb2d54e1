"""The miniature world: a true oracle, a base model of a few hundred thousand weights, and human data for a run's seed."""

import pathlib

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
