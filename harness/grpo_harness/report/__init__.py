"""Rows -> one file of everything, and its views: a page, tables, a comment.

================  ==================================================================
``schema.py``     what ``report.json`` holds: the one source of every view
``tables.py``     a table for a width or for Markdown, with untrusted texts escaped
``report.py``     what a session found: its rows, its tables, what did not pass
``problems.py``   the samples of each problem, beside what was recorded of it
``then.py``       what was other when the baselines were recorded
``comment.py``    a report as a comment of a pull request
``hostile.py``    untrusted text in HTML
``html.py``       a page as one file that loads nothing, by a template
``names.py``      short names for long paths
``passes.py``     pass@j and majority@k, with intervals
``flips.py``      problems that flipped, with both texts
``figures.py``    the page's pictures
``history.py``    runs over time: tables, pictures, and what is proven
``intervals.py``  the intervals of the page, rule by rule
``sections.py``   an evaluation on the page: pictures, rates, flips, commonest texts
``page.py``       the page, ``report.html``
``files.py``      the report and its samples on disk
================  ==================================================================
"""
