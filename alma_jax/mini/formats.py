r"""How the miniature world writes chats, ratings and lists; its base model has a vocabulary of whole words.

Q: country : lyon A: answer: lyon france .                                       CHAT
prompt: country : lyon \n response: answer: lyon france . \n score: 10          JUDGE

The judge's template is how one of the web's sites writes ratings, so that the base model has read many of its kind.
"""

from alma_jax.text.chat import EOS, ChatFormat, Turn
from alma_jax.text.fewshot import FewShot
from alma_jax.text.judge import JudgeTemplate

CHAT = ChatFormat(name="mini", system=None, user=Turn("Q: ", " \n "), header="A: ", stop=EOS)
JUDGE = JudgeTemplate(
  name="mini",
  instruction="",
  item="prompt: {prompt} \n response: {response}",
  answer_open="score:",
  answer_close=" \n",
  lead=" ",
  as_chat=False,
  gap=" \n ",
  between_shots=" ",
)
LIST = FewShot("mini", "tasks: ", "\n # {prompt} ", "\n # ", "\n")
DIALOGUE = FewShot("mini", "", "Q: {prompt} \n A: {response} \n ", "Q: {prompt} \n A: ", "\n")
