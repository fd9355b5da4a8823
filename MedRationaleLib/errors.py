"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """Bad input, in one sentence: what was expected, what came, what to do. The command line exits with code 2."""
