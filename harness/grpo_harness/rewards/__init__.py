"""Completions -> numbers, by TRL's calling convention.

================  ==================================================================
``outcome.py``    what one completion is: correct, wrong, unparsable, truncated, error
``rule.py``       the tutorial's rule reward
``functions.py``  any reward function: loaded, called, checked, known by what it does
================  ==================================================================
"""
