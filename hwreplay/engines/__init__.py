"""Real SGLang servers: started, watched and ended.

`sglang/` goes into SGLang's own environment: installation, plug-ins, shims, and the
shapes of models. Nothing of it is imported here.
"""
