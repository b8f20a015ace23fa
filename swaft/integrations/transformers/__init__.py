"""Weight averaging and noise stability inside transformers' `Trainer`, `Seq2SeqTrainer` and TRL's trainers.

    trainer = Trainer(..., callbacks=[WeightAveragingCallback(), NoiseCallback(swaft.R3F(...))])
    trainer.train()
    with averaged_weights(trainer):
        trainer.evaluate()

Both callbacks need the trainer that calls them, which transformers does not pass (transformers#31338). They find it
on the call stack, once, when training begins.
"""

from swaft.integrations.transformers.averaging import WeightAveragingCallback, averaged_weights
from swaft.integrations.transformers.noise import NoiseCallback
from swaft.integrations.transformers.surface import write_surface

__all__ = ["NoiseCallback", "WeightAveragingCallback", "averaged_weights", "write_surface"]
