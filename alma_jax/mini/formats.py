"""How the miniature world writes: its chat format, its judge's template and its few-shot templates."""

from alma_jax.text.chat import MINI as CHAT
from alma_jax.text.fewshot import DIALOGUES, LISTS
from alma_jax.text.judge import MINI_JUDGE as JUDGE

LIST, DIALOGUE = LISTS["mini"], DIALOGUES["mini"]

__all__ = ["CHAT", "DIALOGUE", "JUDGE", "LIST"]
