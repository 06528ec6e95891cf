"""The frozen backbone: T5 in every released variant, as data first and functions on that data."""
