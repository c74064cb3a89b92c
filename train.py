"""Trains one stage: `accelerate launch train.py recipe=omni_sft model=tiny data=folder data.path=DIR`."""

import hydra
from omegaconf import DictConfig

from train.compose import readable_errors, register, to_run_config
from train.first_weights import open_first_weights

register()


@hydra.main(version_base="1.3", config_path="configs", config_name="run")
def main(composed: DictConfig) -> None:
    """Checks the recipe and the weights it starts from, and only then imports torch and runs it."""
    with readable_errors():
        config = to_run_config(composed)
        open_first_weights(config)
        from train.run import run

        run(config)


if __name__ == "__main__":
    with readable_errors():
        main()
