"""Test the gate: simulated runs whose true change is known, judged by the real rules.

Every promise of the gate is tested on simulated runs, and then on mutants of the gate: a promise
that no mutant can break tests nothing. `python -m tools.calibration` prints all results.

=================  ======================================================
``simulation.py``  how runs are drawn: problems, their skills, their drop
``gates.py``       the rules under test: the gate and its mutants
``promises.py``    what must hold, with the limits
``studies.py``     promises beyond one check of counts, with the alternatives
``histories.py``   promises over several sessions and recordings
``drifts.py``      promises of the scan for change points; has a command of its own
``rewards.py``     promises of the rule for rewards, and mutants of it
``report.py``      tables and the plot
``__main__.py``    the command
=================  ======================================================
"""
