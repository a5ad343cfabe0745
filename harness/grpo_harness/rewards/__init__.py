"""Completions -> numbers, by TRL's calling convention.

================  ==================================================================
``outcome.py``    the outcome of a completion: correct, wrong, unparsable, truncated, error
``rule.py``       the tutorial's rule reward
``timed.py``      call code of the user's within a time
``calls.py``      load and call reward functions, and check what they return
``functions.py``  several reward functions: weights, and what makes a completion correct
``trials.py``     what rewards do on right and wrong texts, by which they are known
================  ==================================================================
"""
