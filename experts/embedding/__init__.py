"""Embedding experts: one encoder, frozen, and LoRA adapters on its query side, behind one index of documents.

encoder.py   the encoder: its files, its tokenizer, its forward pass
adapters.py  adapters beside it, loaded and unloaded while it runs, each text of a batch through its own
expert.py    the `Expert` that the rest of the project sees, one for the encoder and one for each adapter
request.py   OpenAI's embeddings request, checked, and its answer
index.py     documents and their vectors on disk: search, add, delete
"""
