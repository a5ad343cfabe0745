"""Which policy is best, and at which checkpoint it went wrong.

==============  ==================================================================
``search.py``   the first checkpoint that has dropped: a binary search in noise
``pairs.py``    every two policies on every task, judged family-wise
``named.py``    policies by name: found on disk, comparable, asked
``shown.py``    what was found, as tables and sentences, and as a report
==============  ==================================================================
"""
