"""Files that other runtimes execute, written from an integer model."""
