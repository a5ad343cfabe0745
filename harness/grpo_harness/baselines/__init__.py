"""The stored reference: the file, how it is recorded and pruned, and what made it."""
