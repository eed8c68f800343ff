"""The command `jaxrl-post`. It holds no logic of its own: it reads arguments, calls the library, and prints."""
