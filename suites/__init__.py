"""The suites: one file, one question."""
