"""The one exception that reaches a user."""


class LitLoraError(Exception):
    """What the user did wrong and the way out, in one sentence that names the flag, file or row."""
