"""The commands, by what they are about; `mexit.cli` registers them."""
