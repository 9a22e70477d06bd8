"""The builtin safety filter: a small linear model trained on labelled answers.

`scorer` is what serving needs (numpy only: the gateway imports it); `train`, `evaluate` and the CLI make artifacts.
"""
