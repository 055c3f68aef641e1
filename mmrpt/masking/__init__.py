"""From captions to masked samples (MMRPT, 1 to 3).

sentences, words -> score -> baseline -> threshold -> spans, build -> leaks; `pipeline` runs them over a corpus.
"""
