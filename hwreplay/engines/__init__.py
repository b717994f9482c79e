"""Real SGLang servers: started, watched and ended."""
