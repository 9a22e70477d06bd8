"""Algorithms as pure tensor functions: no I/O, no engine, no collectives; each is to be read beside its paper.

Shapes: B rows, T response tokens. ``mask`` (B, T) is 1 on response tokens, end of sequence included, and 0 after.
Means over tokens take the global token count as an argument, so that micro-batches and ranks add up exactly.
"""
