"""The one error that a user can cause."""


class UserError(ValueError):
    """An input that cannot be used, told in one line that names the place (file, line, field)."""
