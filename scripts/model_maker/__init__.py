"""Parts of the model maker: shapes, weights, vocabulary, chat templates and the two GGUF writers.

`make_model.py` and `parity.py` are the programs over them. Nothing here knows torch or the Lookonce library.
"""
