"""Training an EAGLE-3 head: on-policy data, the unrolled loss, the run and the export.

Read in this order: ``recorder`` (features while the engine decodes), ``collect`` (prompts and answers),
``shards`` (the cache on disk), ``model`` (the head as a module), ``unroll`` (training-time test), ``loss``,
``evaluate``, ``loop`` (the run), ``export``. Nothing here serves requests; ``engine/cli/train.py`` puts the
pieces together.
"""
