"""Numbers in, verdict out. It knows no policy, no file and no engine.

==================  ===========================================================
``bounds.py``       limits, and the sizes of change that each rule tolerates or acts on
``inputs.py``       checks of the numbers that callers pass
``stats.py``        exact tests of counts, and intervals
``permutation.py``  the exact test of rewards
``changepoint.py``  since when a figure has changed, over many runs
``plan.py``         how many problems and samples find a drop, predicted
``verdicts.py``     the rules: measurement against reference -> evidence, verdict
==================  ===========================================================
"""
