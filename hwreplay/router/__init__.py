"""HTTP router in front of a disaggregated fleet: one prefill and one decode server a request.

    client ── POST ──> router ──┬── same body + room ──> prefill  (answers one token)
                                └── same body + room ──> decode   (streams; repeats that token)

Which pair is a voltana policy's choice, taken once, on arrival.
"""
