"""Examples to a student, with Ray Train and DeepSpeed.

`train` is the driver, `tokenise` runs before it, `train_loop` on every worker; `train_metrics` brings its figures home.
"""
