"""Training and distillation: `bpkd_sdk.train` and `bpkd_sdk.distill` live in `api`, their one loop in `loop`."""
