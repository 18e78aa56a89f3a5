"""Others' files and converters; those run in an environment of their own, `.venv-peers`."""
