"""Floor 4, the classroom: README.md says how to begin."""
