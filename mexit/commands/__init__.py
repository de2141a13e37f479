"""The commands of the `mexit` program: one file per command with its options, one flow call and its table."""
