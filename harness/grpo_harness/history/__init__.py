"""The runs of a project over time: one small file each, and since when a figure has changed.

===============  ==================================================================
``measured.py``  an evaluation -> the figures that a history keeps
``file.py``      what the file of a run holds; write one, read all
``run.py``       a run, from what its tests carried
``series.py``    one figure of a policy on a task over commits, and its changes
===============  ==================================================================
"""
