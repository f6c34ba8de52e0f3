"""The exceptions that reach a user."""

SHORTAGES = ("can't allocate memory", "out of memory")  # torch's messages on CPU, whose error has no class, and on GPU
CORRUPT_WEIGHTS = (
    "its weights are corrupt, or too large for this --precision (try 32-true)"  # where a model gives no numbers
)
RESUME = "resume with the same command and --resume true"


class LitLoraError(Exception):
    """A user's mistake and its fix, in one sentence that names the flag, file or row."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(LitLoraError):
    """An unknown flag or key, or a value of another type."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


class StoppedError(LitLoraError):
    """A run that was stopped before its end, and how to resume it."""


class EndedElsewhereError(LitLoraError):
    """The end of a rank whose peer reports the cause."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("a peer reports the cause", exit_code)


class OutputClosedError(LitLoraError):
    """The end of a command whose output nobody reads any more, as in `litlora generate ... | head`."""

    def __init__(self) -> None:
        super().__init__("standard output is closed", 128 + 13)  # as a shell reports SIGPIPE


def is_shortage(error: MemoryError | RuntimeError) -> bool:
    """Tell whether memory has run out, Python's or torch's."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in SHORTAGES)
