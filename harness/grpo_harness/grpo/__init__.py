"""The algorithm in plain torch: the readable statement, and the oracle for TRL.

===============  =====================================================================
``tensors.py``   tensors as callers hand them over, checked
``formulas.py``  GRPO's formulas, with TRL's departures from them as options
===============  =====================================================================
"""
