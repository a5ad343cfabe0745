"""Short runs -> has GRPO learned, by reward and held-out accuracy.

=================  ===================================================================
``judge.py``       the gains of a few runs -> PASS or FAIL, every criterion by name
``laboratory.py``  the runs: the real one, and the controls that must fail the same test
=================  ===================================================================
"""
