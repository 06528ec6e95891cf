"""Measurements printed as tables; none of them is a test, none has a limit that fails."""
