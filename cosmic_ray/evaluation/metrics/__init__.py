"""Metrics as pure functions of arrays: the paper's (App. C), and what is needed to say how sure a figure is.

Embeddings, expression and images come in as NumPy arrays; nothing here reads a store, knows a job or starts Ray.
Bad input raises `ValueError`; what is undefined is NaN, never 0. Memory stays bounded: what grows with the product of
two sizes is worked through in blocks of `arrays.BLOCK_BYTES`.
"""
