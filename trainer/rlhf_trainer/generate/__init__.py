"""Sampling from a policy: the ``Generator`` protocol and its default implementation."""
