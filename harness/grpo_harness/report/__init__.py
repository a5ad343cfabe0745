"""Rows -> one file of everything, and its views: a page, tables, a comment.

===============  ==================================================================
``schema.py``    what ``report.json`` holds: the one source of every view
``tables.py``    a table for a width or for Markdown, with untrusted texts escaped
``report.py``    what a session found: its rows, its tables, what did not pass
``problems.py``  the samples of each problem, beside what was recorded of it
``comment.py``   a report as a comment of a pull request
``hostile.py``   untrusted text in HTML
``passes.py``    pass@j and majority@k, with intervals
``flips.py``     problems that flipped, with both texts
``figures.py``   the page's pictures
``history.py``    runs over time: tables, pictures, and what is proven
``page.py``      the page, ``report.html``: with its template, style and script
``files.py``     the report and its samples on disk
===============  ==================================================================
"""
