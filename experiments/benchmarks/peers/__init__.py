"""What runs in an environment of its own, `.venv-peers`: other packages' converters."""
