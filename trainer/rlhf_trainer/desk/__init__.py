"""The service desk: a small world in which human feedback, careless feedback and unsafe answers are all real.

Prompts name a topic and a tone, replies are words over about 120 symbols, and a hidden oracle knows how good a
reply truly is. Raters see the oracle through noise, cohorts and bad habits. Training, gates, safety filters and
the gateway never import the oracle; only this package's report (``judge``) does.
"""
