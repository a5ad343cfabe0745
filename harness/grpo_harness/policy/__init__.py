"""A name -> complete files on disk, identified by digest. No weights.

=================  ===================================================================
``checkpoint.py``  a name -> its files, complete and digested
``policy.py``      those files -> tokenizer, chat template, end tokens, fingerprint
=================  ===================================================================
"""

from grpo_harness.policy.checkpoint import TRAINED_ON, Checkpoint, PolicyError, PolicyName, find
from grpo_harness.policy.policy import SYSTEM_MESSAGE, Fingerprint, Policy, load

__all__ = [
    "SYSTEM_MESSAGE",
    "TRAINED_ON",
    "Checkpoint",
    "Fingerprint",
    "Policy",
    "PolicyError",
    "PolicyName",
    "find",
    "load",
]
