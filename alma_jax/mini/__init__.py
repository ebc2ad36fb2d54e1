"""The miniature world: a true oracle, a small base model, and human data for a run's seed."""

import pathlib

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
PRETRAINED = "pretrained.json"  # beside a base model's weights: how it was pretrained, and its probe
