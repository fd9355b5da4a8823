"""What a failure that is no InputError is called: one sentence for the user, and the exit code of the command line."""

from __future__ import annotations

import re


def explain(error: Exception) -> tuple[str, int]:
    """(sentence, exit code) for an error that is no InputError."""
    if is_out_of_memory(error):
        return (
            "out of memory: the examination needs more than there is; close other programmes, or choose the "
            "device cpu where a GPU ran out; nothing was left behind.",
            1,
        )
    if isinstance(error, ImportError):
        return f"a package cannot be imported ({error}); `medrationale doctor` says what is missing.", 1
    if isinstance(error, OSError) and error.filename:
        return f"Expected access to {error.filename}, got '{error.strerror}'; check the path and its permissions.", 2
    return (
        f"this is a fault of the programme, not yours ({type(error).__name__}: {error}); please report it with the "
        "log, which the command line prints with --debug.",
        1,
    )


def is_out_of_memory(error: Exception) -> bool:
    """torch says it by a class on the GPU and by a sentence on the CPU, ITK by a sentence."""
    words = r"out of memory|can't allocate memory|not enough memory|failed to allocate memory|bad_alloc"
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None)
    )
