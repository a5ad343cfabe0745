"""What is asserted: one file, one question."""
