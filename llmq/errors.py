"""The exception for all errors that the user can fix. Its message states the rule, the value and the remedy."""


class LlmqError(ValueError):
    """The input breaks a rule. The message says which rule, by what value, and what to do instead.

    The commands print it as one line, without a traceback, and exit with status 2.
    """
