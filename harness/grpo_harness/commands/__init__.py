"""The commands of the command line: each module adds some, and runs them.

================  ===============================================================
``common.py``     what commands share
``init.py``       init: write what a repository needs
``runs.py``       settings, admit, store: what runs of pytest have here
``training.py``   train, recipes, resources
``logs.py``       log: judge a training run
``reports.py``    comment, export: show a report elsewhere
``history.py``    history: show runs over time
``baselines.py``  diff: compare recordings
``choice.py``     compare, bisect: which policy, which checkpoint
================  ===============================================================
"""
