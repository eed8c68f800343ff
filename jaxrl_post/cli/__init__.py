"""The command `jaxrl-post`. It holds no logic of its own: it reads arguments, calls the library, and prints."""


class CommandError(ValueError):
    """Arguments that make no sense together or name something that is not there."""
