"""What is computed, on arrays alone."""
