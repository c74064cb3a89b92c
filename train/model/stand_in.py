"""Short supervised tasks that train a tower alone, where no released one is at hand.

The report's stages start from a trained SigLIP and Whisper. A tiny model has none, so its towers
are made first: the vision encoder by naming every patch of a picture, the audio encoder by CTC
(Graves et al., 2006). Both read ordinary samples: the supervised tokens of a sample are the labels
of its patches, or the transcript of its clip. The language model and the connectors do not run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.geometry import MediaConfig
from data.sample import Batch
from train.model.config import ModelConfig
from train.model.head import LossHead
from train.model.omni import LossParts, MegrezOmni

HEADS = ("vision.vpm.label_head.", "audio.audio.ctc_head.")
"""Name prefixes of what these tasks add: they start anew in every run and stay out of its result."""


class PatchLabeller(MegrezOmni):
    """Predicts one token for every patch from the vision encoder's features."""

    def __init__(self, config: ModelConfig, media: MediaConfig):
        super().__init__(config, media)
        self.vision.vpm.label_head = LossHead(config.vision.width, config.llm.vocab, bias=False)
        self.initialise()

    def forward(self, batch: Batch) -> LossParts:
        """Returns the weighted sum of the losses of all patches, and a loss for each supervised position.

        The supervised tokens of a sample label its patches in reading order; the one that ends the
        turn labels none, and its loss is 0.

        Raises:
            ValueError: patches and labels are not equally many.
        """
        features = self.vision.vpm(batch.vision)[_reading_order(batch)]
        labels = (~_ends_sample(batch)).nonzero()[:, 0]
        if len(labels) != len(features):
            raise ValueError(
                f"objective=patch_labels: {len(features)} patches, but {len(labels)} label tokens among "
                f"samples {_names(batch)}. Give each picture one label token a patch, in reading order."
            )
        loss_sum, losses = self.vision.vpm.label_head(  # type: ignore[operator]
            features, batch.targets[labels], batch.weights[labels]
        )
        return LossParts(loss_sum, torch.zeros_like(batch.weights).index_copy(0, labels, losses))


class SpeechReader(MegrezOmni):
    """Transcribes by CTC from the audio encoder's features. The blank is one id beyond the vocabulary."""

    def __init__(self, config: ModelConfig, media: MediaConfig):
        super().__init__(config, media)
        self.audio.audio.ctc_head = nn.Linear(config.audio.width, config.llm.vocab + 1)
        self.initialise()

    def forward(self, batch: Batch) -> LossParts:
        """Returns the weighted sum of the clips' losses; each is spread evenly over its sample's tokens.

        A clip too short for its transcript has the loss 0.

        Raises:
            ValueError: a sample has not exactly one clip.
        """
        logits = self.audio.audio.ctc_head(self.audio.audio(batch.audio, project=False)).float()  # type: ignore[operator]
        if not len(batch.audio.index):
            return LossParts(logits.sum() * 0.0, torch.zeros_like(batch.weights))
        clips = batch.audio.bos_index
        if len(clips) != len(batch.samples):
            raise ValueError(
                f"objective=ctc: {len(clips)} clips in {len(batch.samples)} samples ({_names(batch)}). "
                "Give each sample exactly one clip of at most media.audio.window_seconds."
            )
        supervised = torch.bincount(batch.sample, minlength=len(batch.samples))
        losses = self._ctc(logits, batch, clips.argsort().tolist(), supervised - 1)
        each = (losses / supervised)[batch.sample]
        return LossParts((each * batch.weights).sum(), each.detach())

    def _ctc(self, logits: Tensor, batch: Batch, order: list[int], lengths: Tensor) -> Tensor:
        """Returns the loss of every sample, [N], for transcripts of `lengths` tokens, [N].

        `order` says where each sample's clip lies among the clips.
        """
        frames = batch.audio.cu_seqlens.diff()
        tokens = (frames // 2 if self.audio.audio.pool else frames).tolist()
        rows = logits.split(tokens)
        return F.ctc_loss(
            pad_sequence([rows[place] for place in order]).log_softmax(-1),
            batch.targets[~_ends_sample(batch)],
            torch.tensor([tokens[place] for place in order]),
            lengths.cpu(),
            blank=logits.shape[1] - 1,
            reduction="none",
            zero_infinity=True,
        )


MODEL_OF: dict[str, type[MegrezOmni]] = {
    "next_token": MegrezOmni,
    "patch_labels": PatchLabeller,
    "ctc": SpeechReader,
}
"""What a run trains, by `objective`."""


def _ends_sample(batch: Batch) -> Tensor:
    """Returns, bool [S], which supervised positions are the last of their sample."""
    following = torch.cat([batch.sample[1:], batch.sample.new_full((1,), -1)])
    return (batch.sample != following) if len(batch.sample) else batch.sample.bool()


def _reading_order(batch: Batch) -> Tensor:
    """Returns places of all patches [P] in the order of their slices in the row; none of a blank picture.

    A batch holds slices by size, so that equal ones are computed together.
    """
    vision = batch.vision
    if not len(vision.index):
        return vision.index
    first_tokens = vision.index.view(len(vision.grids), -1)[:, 0]
    sizes = vision.cu_seqlens.diff()
    patches = torch.arange(len(vision.pixels), device=sizes.device).split(sizes.tolist())
    return torch.cat([patches[place] for place in first_tokens.argsort().tolist()])


def _names(batch: Batch) -> str:
    shown = ", ".join(f"{info.source}/{info.key}" for info in batch.samples[:3])
    return shown + (", ..." if len(batch.samples) > 3 else "")
