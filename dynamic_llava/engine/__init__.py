"""Any method over any family of decoders: where tokens are decided on, what the layers behind see, what a cache holds.

`plan.py` is what a call asks for, `paths.py` the loop over the stages that a method's cuts make, `decide.py` the
decisions, `step.py` a single decoding step, `cache.py` its state, `attention.py` the functions that layers attend by,
`record.py` what was kept, `learned.py` the weights of a method that learns, and `families.py` the decoders.
"""
