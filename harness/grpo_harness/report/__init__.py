"""Rows -> tables for a terminal, Markdown and JSON.

============  ===================================================================
``tables.py``  a table for a width or for Markdown, with untrusted texts escaped
``report.py``  what a session found: its rows, its tables, what did not pass
``comment.py``  a report as a comment of a pull request
``files.py``   the report and its samples on disk
============  ===================================================================
"""
