"""The one kind of error that a user can cause and cure."""


class UserError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and the cure.

    Every command turns it into that line on stderr and exit code 2 (`common.config.run`); of
    several processes, which all meet it, the first one does.
    """


class LocalError(UserError):
    """Bad input that only the process which met it can tell of."""
