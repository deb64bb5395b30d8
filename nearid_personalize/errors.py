"""The one exception that means "the user's input is wrong"."""


class InputError(ValueError):
    """A fault in what the user gave: a file, a folder, a flag.

    The message is a single line that names the file or flag, the value got, and what would work. Commands print it
    as `error: ...` and exit with status 2; library callers catch it as the `ValueError` it is.
    """


def in_one_line(error: BaseException, length: int = 200) -> str:
    """What an error says, in one line, cut to a length; the name of its type where it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__
