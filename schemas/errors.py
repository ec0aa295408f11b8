"""The one exception that means "the user can fix this"."""


class InputError(Exception):
    """A mistake in parameters, files or set-up, told in one sentence, with the next thing to do.

    Args:
        message: one sentence that names the value and the place.
        hint: what to run or change.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint
