"""``report.json`` -> the files of other tools, in which its evaluations are read and compared.

=======================  ==========================================================
``scores.py``            what both have: the scores of each completion, their means
``inspect_log.py``       inspect_ai's logs, by its own API: for ``inspect view``
``every_eval_ever.py``   the records of Every Eval Ever, and their samples
=======================  ==========================================================
"""
