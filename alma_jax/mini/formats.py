"""How the miniature world writes chats, ratings and lists; its base model has a vocabulary of whole words.

Q: country : lyon A: answer: lyon france .                                       CHAT
rate prompt: country : lyon response: answer: lyon france . rating: [[ 10 ]]     JUDGE
"""

from alma_jax.text.chat import EOS, ChatFormat, Turn
from alma_jax.text.fewshot import FewShot
from alma_jax.text.judge import JudgeTemplate

CHAT = ChatFormat(name="mini", system=None, user=Turn("Q: ", " \n "), header="A: ", stop=EOS)
JUDGE = JudgeTemplate(
  name="mini",
  instruction="",
  item="rate prompt: {prompt} response: {response}",
  answer_open="rating: [[",
  answer_close=" ]]",
  lead=" ",
  as_chat=False,
  gap=" ",
  between_shots=" \n ",
)
LIST = FewShot("mini", "tasks: ", "\n # {prompt} ", "\n # ", "\n")
DIALOGUE = FewShot("mini", "", "Q: {prompt} \n A: {response} \n ", "Q: {prompt} \n A: ", "\n")
