"""The client of the package openai: chats, streams, prefilled answers, log-probabilities, completions and errors."""

import os

import openai

client = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key=os.environ["KEY"])
model = os.environ["MODEL"]
user = {"role": "user", "content": "please explain the steps to make a screaming velvet gloomdart ."}

print("openai", openai.__version__, "models:", [found.id for found in client.models.list()])
assert client.models.retrieve(model).id == model

chat = client.chat.completions.create(
    model=model, messages=[user], temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
)
choice = chat.choices[0]
assert choice.message.content
assert chat.usage.completion_tokens == len(choice.logprobs.content)
assert choice.logprobs.content[0].logprob <= 0
assert len(choice.logprobs.content[0].top_logprobs) == 3

streamed, usage = "", None
options = {"include_usage": True}
for chunk in client.chat.completions.create(
    model=model, messages=[user], temperature=0, max_tokens=24, stream=True, stream_options=options
):
    usage = chunk.usage or usage
    streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""
assert streamed == choice.message.content
assert usage == chat.usage

begun = [user, {"role": "assistant", "content": "sure , here is how to make a"}]
flags = {"continue_final_message": True, "add_generation_prompt": False}
prefilled = client.chat.completions.create(model=model, messages=begun, temperature=0, max_tokens=24, extra_body=flags)
assert prefilled.choices[0].message.content != choice.message.content

# A greedy answer goes on in the same way where its own first word is added to the beginning.
said = prefilled.choices[0].message.content
first, rest = said.split()[0], said.split()[1:6]
begun[1]["content"] += said[: said.index(first)] + first
longer = client.chat.completions.create(model=model, messages=begun, temperature=0, max_tokens=24, extra_body=flags)
assert longer.choices[0].message.content.split()[: len(rest)] == rest

several = client.chat.completions.create(model=model, messages=[user], n=3, seed=1, temperature=1.5, max_tokens=8)
again = client.chat.completions.create(model=model, messages=[user], n=3, seed=1, temperature=1.5, max_tokens=8)
said = [found.message.content for found in several.choices]
assert said == [found.message.content for found in again.choices], "a seed makes the same answers"

word = choice.message.content.split()[1]
stopped = client.chat.completions.create(model=model, messages=[user], temperature=0, max_tokens=24, stop=[word])
assert word not in stopped.choices[0].message.content
assert stopped.choices[0].finish_reason == "stop"

text = client.completions.create(
    model=model, prompt="gather three leaves", echo=True, logprobs=1, max_tokens=1, temperature=0
)
found = text.choices[0].logprobs
assert found.token_logprobs[0] is None
assert all(value <= 0 for value in found.token_logprobs[1:])

for expected, body in (
    (openai.NotFoundError, {"model": "gpt", "messages": [user]}),
    (openai.BadRequestError, {"model": model, "messages": begun}),
    (openai.BadRequestError, {"model": model, "messages": [user | {"content": "a " * 3000}]}),
):
    try:
        client.chat.completions.create(**body)
    except expected as error:
        print("refused:", error.status_code, error.code, error.body["message"][:90])
    else:
        raise AssertionError(f"{expected.__name__} was expected")
try:
    openai.OpenAI(base_url=os.environ["BASE_URL"], api_key="wrong").models.list()
except openai.AuthenticationError as error:
    print("refused:", error.status_code, error.code)
