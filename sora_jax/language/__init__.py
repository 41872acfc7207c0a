"""Language around the video model: captions of a training set, and longer prompts.

Sora's report trains on highly descriptive captions that a captioner has written, and
expands what users type to such captions (DALL-E 3's paper says how). `recaption` asks a
captioner, ours or one behind an endpoint, for captions of a manifest's clips and keeps
each answer; `expansion` does the like for prompts.
"""
