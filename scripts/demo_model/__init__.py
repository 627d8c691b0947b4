"""Training of the demo model: a LLaVA of 6 M parameters that answers questions about the scenes of `scenes/`.

build.py     configuration, tokenizer and module
words.py     what each patch of a scene shows, as words
batches.py   scenes, questions and labels as tensors, by step number alone
stages.py    the losses, in the order in which LLaVA's parts are trained
train.py     optimizer, schedule, checkpoints, resume
"""
