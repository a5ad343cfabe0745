"""The nano pair: two tiny policies of the Qwen2 architecture, shipped inside the package.

``base/`` was taught the tasks, then completions of mixed quality. ``trained/`` is ``base/`` after
GRPO. ``CARD.md`` says how both were made and how accurate they are.
"""
