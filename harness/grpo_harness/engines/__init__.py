"""Engines draw completions: requests in, samples out, in order. One file, one engine.

===================  ==================================================================
``engine.py``        the interface of every engine
``adapters.py``      merge an adapter into the model of its base
``weights.py``       load a policy's weights, and check them against its files
``residency.py``     which policies' weights are in memory at once
``transformers.py``  an engine that uses transformers, on this machine
===================  ==================================================================
"""
