"""Completions -> numbers, by TRL's calling convention.

================  ==================================================================
``outcome.py``    the outcome of a completion: correct, wrong, unparsable, truncated, error
``rule.py``       the tutorial's rule reward
``functions.py``  reward functions: load, call, check, weigh and digest them
================  ==================================================================
"""
