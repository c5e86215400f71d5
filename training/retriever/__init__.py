"""RouterRetriever (AAAI 2025, arXiv 2409.02685): many embedding experts behind one index.

corpus.py    collections in BEIR's layout
pairs.py     what adapters are trained on: judged training queries, or sentences and the rest of their document
fit.py       one adapter from pairs
train.py     `router-service train retriever`: adapters, pilots, fleet file, policy
measures.py  nDCG, recall, rankings, BM25
evaluate.py  what routing between adapters is worth, beside everything it is to be compared with
"""
