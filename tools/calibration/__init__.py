"""The gate's own test: simulated runs whose truth is known, judged by the real rules.

Every promise of the gate is held against simulated runs, and then against mutants of the gate:
a promise that no mutant can break tests nothing. `python -m tools.calibration` prints it all.

=================  ======================================================
``simulation.py``  how runs are drawn: problems, their skills, their drop
``gates.py``       the rules under test: the gate and its mutants
``promises.py``    what must hold, with every figure to reach
``studies.py``     the promises that span several runs, each with the usual way beside it
``report.py``      tables and the plot
``__main__.py``    the command
=================  ======================================================
"""
