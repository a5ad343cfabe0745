"""How completions are drawn: requests in, samples out, in order. One file, one engine.

===================  ==================================================================
``engine.py``        what every engine takes, gives and promises
``weights.py``       a policy's weights in memory, proven to be those of its files
``residency.py``     which policies' weights are in memory at once
``transformers.py``  the engine of transformers, on this machine
===================  ==================================================================
"""
