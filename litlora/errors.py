"""The exceptions that reach a user."""


class LitLoraError(Exception):
    """What the user did wrong and the way out, in one sentence that names the flag, file or row."""

    exit_code = 1


class StoppedError(LitLoraError):
    """A run that was told to stop before its end, and how to go on with it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EndedElsewhereError(LitLoraError):
    """The end of a process that trains with others, one of which says why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code
