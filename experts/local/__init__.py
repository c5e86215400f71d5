"""Local experts: any causal language model that transformers loads, with PEFT adapters on a shared base.

expert.py   the `Expert` that the rest of the project sees, one for the base and one for each adapter
request.py  what the body of a request asks for, checked
reply.py    OpenAI's shapes of what comes back
engine.py   the one thread that runs the model for all requests at once
batch.py    sequences that step together, and their key-value cache
row.py      one answer in the making: its tokens, text, stop strings and log-probabilities
sampling.py from logits to the next token
text.py     from tokens to text, and stop strings
model.py    loading and running the model
lora.py     adapters: reading PEFT's files, and linear layers that apply a different one to each row
"""
