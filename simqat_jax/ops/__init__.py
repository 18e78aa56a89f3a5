"""What an operation is on integers: one family a file."""
