"""Source of an exported folder's own code: what transformers runs with `trust_remote_code`.

These files, and whatever of `data` and `train.model` they import, are copied into the folder
(train/export/hub_code.py), so they use torch, transformers, numpy, Pillow and tokenizers alone, and of
transformers only what versions 4 and 5 share.
"""
