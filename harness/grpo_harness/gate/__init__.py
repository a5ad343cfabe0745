"""Numbers in, verdict out. It knows no policy, no file and no engine.

===============  ==============================================================
``bounds.py``    limits, and how large a change each rule tolerates and acts on
``inputs.py``    numbers as callers hand them over, checked
``stats.py``     exact tests and intervals
``verdicts.py``  the rules: measurement against reference -> evidence, verdict
===============  ==============================================================
"""
