"""What goes wrong with a trace or a run record, told in one line."""


class TraceError(ValueError):
    """A file or an argument that cannot be used; the message is one line that names the place."""
