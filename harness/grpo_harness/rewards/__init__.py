"""Completions -> numbers, by TRL's calling convention."""
