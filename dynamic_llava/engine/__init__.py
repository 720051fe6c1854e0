"""Any method over any family of decoders: where tokens are decided on, what the layers behind see, what a cache holds.

`decoder.py` is the sparse decoder of each family, `plan.py` what a call asks for, `paths.py` the loop over the stages
that a method's cuts make, `decide.py` the decisions, `step.py` a single decoding step, `cache.py` its state, `evict.py`
a cache that forgets, `attention.py` the functions that layers attend by, `record.py` what was kept, and `learned.py`
the weights of a method that learns.
"""
