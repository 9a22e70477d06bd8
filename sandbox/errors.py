"""The one exception of the sandbox: its message is what the user reads."""

from __future__ import annotations


class SandboxError(Exception):
    """Something the user can act on. The message says what is wrong, where, and what to do."""
