"""The two sides of ``benchmarks.trl_steps``: each a process of its own that takes one step when told to."""
