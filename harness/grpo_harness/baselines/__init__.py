"""Baselines: the stored references that runs are compared with.

=================  ==============================================================
``provenance.py``  commit, environment and code behind a measurement
``examples.py``    some recorded completions with their scores: what the rewards were
``file.py``        one baseline file: schema, loading, comparing, writing
``diff.py``        what changed between two recordings, in a sentence
``recording.py``   record a baseline, tested against the previous one and the anchor
``pruning.py``     find and delete stale baselines
=================  ==============================================================
"""
