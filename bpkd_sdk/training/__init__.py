"""Training and distillation: `api` defines train and distill, `loop` the training loop."""
