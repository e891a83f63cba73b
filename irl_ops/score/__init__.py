"""``irl-ops score``: the rewards that a language model gives to answers (Sec. 3.4).

``Scorer`` does it in Python; the rest of this package reads, resumes, writes and shows.
"""
