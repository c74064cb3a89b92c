"""Everything accelerator ranks run: configs, model, engine, step, checkpoints."""
