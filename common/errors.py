"""The one kind of error that a user can cause and cure."""


class UserError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and the cure.

    Every command turns it into that line on stderr and exit code 2 (`common.config.run`).
    """
