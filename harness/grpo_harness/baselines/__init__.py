"""The stored reference: what runs are judged by.

=================  ==============================================================
``provenance.py``  what made a measurement besides the policy: commit, environment, code
``file.py``        one file, typed: load it, compare with it, write it
``recording.py``   a new one, tested against the one before it and the anchor
``pruning.py``     what no run asks for any more, and its removal
=================  ==============================================================
"""
