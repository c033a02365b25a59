"""The one exception that bad input raises."""


class InputError(ValueError):
    """Something the user can put right: a bad argument, a missing file, a run that diverged.

    The message is one line that names the argument or the file, what came, and what is allowed. The command
    line prints it without a traceback.
    """
