"""Times and sizes of quantized networks against float ones, measured in one process."""
