"""The first day: what is in a repository, and the files that it needs to be judged.

Nothing that is found is imported or run, and nothing that exists is overwritten.

==================  ====================================================================
``checkpoints.py``  a folder as a policy: is it one, was it trained, and from what
``data.py``         a file as a data set: its columns, by its first row
``rewards.py``      a module as a source of reward functions, by its syntax
``recipes.py``      a YAML file as a recipe of TRL
``look.py``         a repository: everything of these that is there
``choose.py``       of what is there, what is judged; and why
``table.py``        that as a table of pyproject.toml
``write.py``        the files that are written
==================  ====================================================================
"""
