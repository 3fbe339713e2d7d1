"""Errors that a person can cause and mend. The command line prints their one sentence and exits with 2.

Every message says what happened, what was expected (with units), and what to do.
"""


class UserError(Exception):
    """Base of everything below: never a bug of the library."""


class InputError(UserError):
    """A file, a text or a setting cannot be used as it is."""


class PartMissing(UserError):
    """Something that set-up provides (the language model, a voice, a judge) is not there."""


class StageMissing(UserError):
    """A stage folder that is needed has not been trained yet."""


class StageMismatch(UserError):
    """A stage folder is there, but of another scale, shape, or parent."""


class FrozenChanged(UserError):
    """A tensor that must stay frozen is no longer bit-identical."""
