"""From a plan to a program on integers."""
