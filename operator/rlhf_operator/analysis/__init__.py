"""Sequential comparison of a candidate with stable: valid at every moment it is looked at. Pure; no I/O, no clock.

    harm.py        is the candidate worse?            e-process, Fail
    difference.py  by how much at most, at least?     confidence sequence, Pass
    split.py       is traffic split as configured?    e-process, hold
    latency.py     which answers are slow?            quantile of stable's own histogram
    fold.py        cumulative gateway counters -> what is new in them, each once
    trial.py       the state of all of it, a few JSON numbers, and its update
    verdict.py     the state -> Pass, Fail, NeedMoreData or Unknown, with what is missing

The unit is the conversation, since requests of one conversation depend on each other.
"""
