"""The one error class for bad input: the command line prints it as a single line."""


class InputError(ValueError):
    """Something the user gave breaks a rule.

    The message is one line that names the value, the rule and the remedy. The command line prints
    it without a traceback and exits with status 2; anything else is a defect and keeps its trace.
    """
