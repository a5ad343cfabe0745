"""A training run's log: read, summed up in figures, and judged against recorded runs.

================  ==============================================================
``read.py``       what a run of TRL's trainer has logged, from the files it left
``figures.py``    the table of figures: what each measures, and how
``recorded.py``   the recorded runs of a training, a file in the project
``judge.py``      a run against recorded ones: bands, verdicts, where it left
``plot.py``       the curves of a run over the bands of the recorded ones
``hacking.py``    has reward risen while the decisive reward fell?
``reconcile.py``  is the saved checkpoint the policy whose curve was logged?
================  ==============================================================
"""
