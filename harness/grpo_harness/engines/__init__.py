"""Engines draw completions: requests in, samples out, in order. One file, one engine.

===================  ==================================================================
``engine.py``        the interface of every engine
``remote.py``        what engines share that draw elsewhere
``endpoint.py``      where a policy is served: its addresses, model and key
``client.py``        HTTP to servers: shared work, retries, adaptive concurrency
``server.py``        the engine of a served policy: any OpenAI-compatible server
``adapters.py``      merge an adapter into the model of its base
``weights.py``       load a policy's weights, and check them against its files
``residency.py``     which policies' weights are in memory at once
``completions.py``   where a completion ends, and the sample that its tokens are
``draw.py``          the next token of each row, by one uniform number
``shared.py``        attention over prompts that rows share: a cache of transformers
``decoding.py``      draw many rows: prompts read once a group, ended rows leave
``shareable.py``     whether a model can do that: asked of its config, then tried
``generate.py``      draw by transformers' own ``generate``, for the other models
``transformers.py``  the engine of transformers, on this machine
``floor.py``         the time of the model's matrix products alone
``chunks.py``        divide requests into chunks, and hand these out to workers
``ray_worker.py``    a worker of a Ray cluster, on its node
``ray_cluster.py``   a Ray cluster: its workers are started, asked, lost and ended
``ray.py``           the engine of a Ray cluster
``likelihood.py``    log-probabilities of texts, by weights and by a server
===================  ==================================================================
"""
