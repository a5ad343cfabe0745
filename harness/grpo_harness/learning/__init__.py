"""Short runs -> has GRPO learned, by what it gained.

=================  ===================================================================
``judge.py``       what a few runs gained -> PASS or FAIL, every criterion by name
``laboratory.py``  the runs: the real one, and the controls that must fail the same test
=================  ===================================================================
"""
