"""`router_r1`: a language model that thinks, asks several experts in turn, reads what they say, and answers.

Router-R1 (arXiv 2506.09033). `protocol` is what the model reads and writes, `strategy` what is done with it.
"""
