"""Local experts: any causal language model that transformers loads, with PEFT adapters on a shared base.

expert.py     the `Expert` that the rest of the project sees: the base, an adapter, a mixture or a gate
request.py    what the body of a request asks for, checked
reply.py      OpenAI's shapes of what comes back
engine.py     the one thread that runs the model for all requests at once
queue.py      who is next
batch.py      prompts that are read together, answers that grow together
cache.py      their keys and values
attention.py  how a new token attends to them
row.py        one answer in the making: its tokens, text, stop strings and log-probabilities
sampling.py   from logits to the next tokens
text.py       from tokens to text, and stop strings
model.py      loading and running the model
sites.py      its linear layers, with room for adapters
pool.py       which adapters are on the device
registry.py   adapters and gates by name
mixture.py    what a request is answered with
lora.py       reading adapters in PEFT's format
vllm.py       vLLM as the engine, where it is installed

docs/engine.md says how it works.
"""
