"""The one exception that carries a message for the user: the rule, the value and the remedy."""


class LlmqError(ValueError):
    """A rule was broken by the input; the message says which, by what value, and what to do instead.

    The commands print it as one line and exit with status 2; a traceback is never shown for it.
    """
