"""The one class of errors that a user can mend; all others are ours and show their traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Input, options or environment are wrong; the message names what, where and what to do.

    A command prints the message alone and exits with 2. A ``ValueError`` so that validators of
    specs may raise it.
    """
