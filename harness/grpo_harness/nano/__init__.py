"""The nano pair: two tiny policies of the Qwen2 architecture, shipped inside the package.

``base/`` knows more than it shows, ``trained/`` is what GRPO makes of it, ``CARD.md`` says how
both were made and how well they answer.
"""
