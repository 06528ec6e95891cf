"""Foreign formats of prompts, one file each."""
