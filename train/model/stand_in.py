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
from data.sample import Batch, VisionBatch
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

    def forward(self, batch: Batch) -> LossParts:
        """Returns the weighted sum of the losses of all patches, and a loss for each supervised position.

        The supervised tokens of a sample label its patches in reading order; the one that ends the
        turn labels none, and its loss is 0.

        Raises:
            ValueError: the patches and labels of a sample are not equally many.
        """
        _check_patches(batch)
        features = self.vision.vpm(batch.vision)[_reading_order(batch)]
        labels = (~_ends_sample(batch)).nonzero()[:, 0]
        loss_sum, losses = self.vision.vpm.label_head(  # type: ignore[operator]
            features, batch.targets[labels], batch.weights[labels]
        )
        return LossParts(loss_sum, torch.zeros_like(batch.weights).index_copy(0, labels, losses))


class SpeechReader(MegrezOmni):
    """Transcribes by CTC from the audio encoder's features. The blank is one id beyond the vocabulary."""

    def __init__(self, config: ModelConfig, media: MediaConfig):
        super().__init__(config, media)
        self.audio.audio.ctc_head = nn.Linear(config.audio.width, config.llm.vocab + 1)

    def forward(self, batch: Batch) -> LossParts:
        """Returns the weighted sum of the clips' losses; each is spread evenly over its sample's tokens.

        A clip too short for its transcript has the loss 0.

        Raises:
            ValueError: a sample has not exactly one clip, in a batch that has any.
        """
        logits = self.audio.audio.ctc_head(self.audio.audio(batch.audio, project=False)).float()  # type: ignore[operator]
        if not len(batch.audio.index):
            return LossParts(logits.sum() * 0.0, torch.zeros_like(batch.weights))
        _check_clips(batch)
        supervised = torch.bincount(batch.sample, minlength=len(batch.samples))
        losses = self._ctc(logits, batch, batch.audio.bos_index.argsort().tolist(), supervised - 1)
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
    first_tokens, sizes = _slices(vision)
    patches = torch.arange(len(vision.pixels), device=sizes.device).split(sizes.tolist())
    return torch.cat([patches[place] for place in first_tokens.argsort().tolist()])


def _slices(vision: VisionBatch) -> tuple[Tensor, Tensor]:
    """Returns the place of each slice's first token and its number of patches, [N] each."""
    return vision.index.view(len(vision.grids), -1)[:, 0].contiguous(), vision.cu_seqlens.diff()


def _check_patches(batch: Batch) -> None:
    patches = [0] * (len(batch.samples) + 1)
    if len(batch.vision.index):
        patches = _count_by_sample(batch, *_slices(batch.vision))
    wrong = [
        f"{info.source}/{info.key} has {count} patches, but {max(info.supervised - 1, 0)} label tokens"
        for info, count in zip(batch.samples, patches)
        if count != max(info.supervised - 1, 0)
    ]
    if patches[-1]:
        wrong.append(f"{patches[-1]} patches are of samples without a label")
    if wrong:
        raise ValueError(
            f"objective=patch_labels: {_listed(wrong)}. Give each picture one label token a patch, in "
            "reading order."
        )


def _check_clips(batch: Batch) -> None:
    places = batch.audio.bos_index
    clips = _count_by_sample(batch, places, torch.ones_like(places))
    wrong = [
        f"{info.source}/{info.key} has {count} clips"
        for info, count in zip(batch.samples, clips)
        if count != 1
    ]
    if wrong:
        raise ValueError(
            f"objective=ctc: {_listed(wrong)}. Give each sample exactly one clip of at most "
            "media.audio.window_seconds."
        )


def _count_by_sample(batch: Batch, places: Tensor, amounts: Tensor) -> list[int]:
    """Returns the sum of the amounts at places in each sample, and last of those in none with a label.

    A segment of the batch is a sample, so its supervised positions tell which. Totals alone would let
    one sample's labels slide onto the media of another.

    Shapes: places int64 [N], amounts int [N].
    """
    bounds = batch.cu_seqlens.long()
    owners = batch.sample.new_full((len(bounds) + 1,), len(batch.samples))
    owners[torch.searchsorted(bounds, batch.supervised, right=True)] = batch.sample
    found = owners[torch.searchsorted(bounds, places, right=True)]
    counts = batch.sample.new_zeros(len(batch.samples) + 1)
    return counts.index_add(0, found, amounts.long()).tolist()


def _listed(wrong: list[str]) -> str:
    return ", ".join(wrong[:3]) + (f", and {len(wrong) - 3} more" if len(wrong) > 3 else "")
