"""Models of random weights: shapes, weights, vocabulary, chat templates, the two GGUF writers, and pairs made of them.

For tests and benchmarks: their speed and memory are those of a real model of the shape. Nothing here knows torch.
"""
