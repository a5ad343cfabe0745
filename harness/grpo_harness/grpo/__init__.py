"""The algorithm in plain torch: the readable statement, and the oracle for TRL."""
