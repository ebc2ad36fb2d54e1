"""What the protocols' judges are told, letter by letter: a score under another text is another score.

From FastChat (lm-sys/FastChat, fastchat/llm_judge/data/judge_prompts.jsonl), AlpacaEval (tatsu-lab/alpaca_eval,
alpaca_eval_clf.txt) and Arena-Hard (lmarena/arena-hard-auto, utils/judge_utils.py), all under the Apache License 2.0,
and from the appendix of LIMA (arXiv 2305.11206). ALMA's own text (A.2) is `text.judge.A2`.
"""

# MT-Bench, one answer with a rating of 1 to 10: `single-v1` and its three variants

MT_BENCH_SYSTEM = """\
You are a helpful assistant."""

MT_BENCH = """\
[Instruction]
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question displayed below. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, \
depth, creativity, and level of detail of the response. Begin your evaluation by providing a short explanation. Be \
as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by \
strictly following this format: "[[rating]]", for example: "Rating: [[5]]".

[Question]
{question}

[The Start of Assistant's Answer]
{answer}
[The End of Assistant's Answer]"""

MT_BENCH_REFERENCE = """\
[Instruction]
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question displayed below. Your evaluation should consider correctness and helpfulness. You will be given a reference \
answer and the assistant's answer. Begin your evaluation by comparing the assistant's answer with the reference \
answer. Identify and correct any mistakes. Be as objective as possible. After providing your explanation, you must \
rate the response on a scale of 1 to 10 by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".

[Question]
{question}

[The Start of Reference Answer]
{ref_answer_1}
[The End of Reference Answer]

[The Start of Assistant's Answer]
{answer}
[The End of Assistant's Answer]"""

MT_BENCH_SECOND_SYSTEM = """\
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question displayed below. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, \
depth, creativity, and level of detail of the response. You evaluation should focus on the assistant's answer to the \
second user question. Begin your evaluation by providing a short explanation. Be as objective as possible. After \
providing your explanation, you must rate the response on a scale of 1 to 10 by strictly following this format: \
"[[rating]]", for example: "Rating: [[5]]".

"""

MT_BENCH_SECOND = """\
<|The Start of Assistant A's Conversation with User|>

### User:
{question_1}

### Assistant A:
{answer_1}

### User:
{question_2}

### Assistant A:
{answer_2}

<|The End of Assistant A's Conversation with User|>"""

MT_BENCH_SECOND_REFERENCE_SYSTEM = """\
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user \
question. Your evaluation should consider correctness and helpfulness. You will be given a reference answer and the \
assistant's answer. You evaluation should focus on the assistant's answer to the second question. Begin your \
evaluation by comparing the assistant's answer with the reference answer. Identify and correct any mistakes. Be as \
objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by \
strictly following this format: "[[rating]]", for example: "Rating: [[5]]".

"""

MT_BENCH_SECOND_REFERENCE = """\
<|The Start of Reference Answer|>

### User:
{question_1}

### Reference answer:
{ref_answer_1}

### User:
{question_2}

### Reference answer:
{ref_answer_2}

<|The End of Reference Answer|>


<|The Start of Assistant A's Conversation with User|>

### User:
{question_1}

### Assistant A:
{answer_1}

### User:
{question_2}

### Assistant A:
{answer_2}

<|The End of Assistant A's Conversation with User|>"""

# AlpacaEval 2.0: which of two answers, m or M

ALPACA_EVAL_SYSTEM = """\
You are a highly efficient assistant, who evaluates and selects the best large language model (LLMs) based on the \
quality of their responses to a given instruction. This process will be used to create a leaderboard reflecting the \
most accurate and human-preferred answers."""

ALPACA_EVAL = '''\
I require a leaderboard for various large language models. I'll provide you with prompts given to these models and \
their corresponding outputs. Your task is to assess these responses, and select the model that produces the best \
output from a human perspective.

## Instruction

{
    "instruction": """{instruction}""",
}

## Model Outputs

Here are the unordered outputs from the models. Each output is associated with a specific model, identified by a \
unique model identifier.

{
    {
        "model_identifier": "m",
        "output": """{output_1}"""
    },
    {
        "model_identifier": "M",
        "output": """{output_2}"""
    }
}

## Task

Evaluate the models based on the quality and relevance of their outputs, and select the model that generated the \
best output. Answer by providing the model identifier of the best model. We will use your output as the name of the \
best model, so make sure your output only contains one of the following model identifiers and nothing else (no \
quotes, no spaces, no new lines, ...): m or M.

## Best Model Identifier'''

# Arena-Hard, both editions; the second asks about creative writing without writing an answer of its own

ARENA_HARD_SYSTEM = """\
Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to the user \
prompt displayed below. You will be given assistant A's answer and assistant B's answer. Your job is to evaluate \
which assistant's answer is better.

Begin your evaluation by generating your own answer to the prompt. You must provide your answers before judging any \
answers.

When evaluating the assistants' answers, compare both assistants' answers with your answer. You must identify and \
correct any mistakes or inaccurate information.

Then consider if the assistant's answers are helpful, relevant, and concise. Helpful means the answer correctly \
responds to the prompt or follows the instructions. Note when user prompt has any ambiguity or more than one \
interpretation, it is more helpful and appropriate to ask for clarifications or more information from the user than \
providing an answer based on assumptions. Relevant means all parts of the response closely connect or are \
appropriate to what is being asked. Concise means the response is clear and not verbose or excessive.

Then consider the creativity and novelty of the assistant's answers when needed. Finally, identify any missing \
important information in the assistants' answers that would be beneficial to include when responding to the user \
prompt.

After providing your explanation, you must output only one of the following choices as your final verdict with a \
label:

1. Assistant A is significantly better: [[A>>B]]
2. Assistant A is slightly better: [[A>B]]
3. Tie, relatively the same: [[A=B]]
4. Assistant B is slightly better: [[B>A]]
5. Assistant B is significantly better: [[B>>A]]

Example output: "My final verdict is tie: [[A=B]]"."""

_OWN_ANSWER = """\
Begin your evaluation by generating your own answer to the prompt. You must provide your answers before judging any \
answers.

"""
ARENA_HARD_CREATIVE_SYSTEM = ARENA_HARD_SYSTEM.replace(_OWN_ANSWER, "").replace("answers with your answer.", "answers.")

ARENA_HARD = """\
<|User Prompt|>
{question}

<|The Start of Assistant A's Answer|>
{answer_a}
<|The End of Assistant A's Answer|>

<|The Start of Assistant B's Answer|>
{answer_b}
<|The End of Assistant B's Answer|>"""

ARENA_HARD_AGAIN = """\
continue your judgment and finish by outputting a final verdict label"""

# LIMA's helpfulness from 1 to 6 (appendix of the paper)

LIMA_RATING = """\
You are evaluating a response that has been submitted for a particular task, using a specific set of standards. \
Below is the data:
[BEGIN DATA]
***
[Task]: {question}
***
[Submission]: {answer}
***
[Criterion]: helpfulness:
"1": "Not helpful - The generated text is completely irrelevant, unclear, or incomplete. It does not provide any \
useful information to the user."
"2": "Somewhat helpful - The generated text has some relevance to the user’s question, but it may be unclear or \
incomplete. It provides only partial information, or the information provided may not be useful for the user’s needs."
"3": "Moderately helpful - The generated text is relevant to the user’s question, and it provides a clear and \
complete answer. However, it may lack detail or explanation that would be helpful for the user."
"4": "Helpful - The generated text is quite relevant to the user’s question, and it provides a clear, complete, and \
detailed answer. It offers additional information or explanations that are useful for the user. However, some of the \
points of the response are somewhat repetitive or could be combined for greater clarity and concision"
"5": "Very helpful - The generated text is highly relevant to the user’s question, and it provides a clear, \
complete, and detailed answer. It offers additional information, explanations, or analogies that are not only useful \
but also insightful and valuable to the user. However, the structured of the response is not well-organized and \
there is no clear progression or logical sequence of different points in the response."
"6": "Highly helpful - The generated text provides a clear, complete, and detailed answer. It offers additional \
information or explanations that are not only useful but also insightful and valuable to the user. The response is \
also in a logical and easy-to-follow manner by explicitly using headings, bullet points, or numbered lists to break \
up the information and make it easier to read."
***
[END DATA]

Does the submission meet the criterion? First, write out in a step by step manner your reasoning about the criterion \
to be sure that your conclusion is correct. Avoid simply stating the correct answers at the outset. Then print the \
choice only from “1, 2, 3, 4, 5, 6” (without quotes or punctuation) on its own line corresponding to the correct \
answer. At the end, repeat just the selected choice again by itself on a new line."""

# LIMA's comparison of two answers. The paper gives annotators and GPT-4 three choices and prints no text for the model:
# this one is ours.
LIMA_PAIRWISE = """\
Imagine that you have a capable assistant and need help with the question below. Two assistants have answered it. \
Decide which answer meets your needs better. Neither the order of the answers nor their length should matter.

[Question]
{question}

[The Start of Answer A]
{answer_a}
[The End of Answer A]

[The Start of Answer B]
{answer_b}
[The End of Answer B]

Explain your choice in a few sentences. Then end with exactly one of these lines:
[[A]] if answer A is significantly better,
[[B]] if answer B is significantly better,
[[C]] if neither is significantly better."""
