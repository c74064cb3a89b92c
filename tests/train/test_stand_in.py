"""Stand-in tasks: each tower alone, on the ordinary batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.collate import BlankSegment
from data.sample import IGNORE, Dropped, EncodedSample
from tests.train.tiny_model import MEDIA, gradients, make_batch, make_sample, tiny_config
from train.model.initial import build_model
from train.model.omni import module_of
from train.model.stand_in import HEADS, MODEL_OF

FLAGS = ("vision_encoder", "vision_proj", "llm", "audio_encoder", "audio_proj")


def stand_in(objective: str):
    model = build_model(tiny_config(), MEDIA, 0, MODEL_OF[objective])
    tower = {"patch_labels": "vision_encoder", "ctc": "audio_encoder"}[objective]
    model.set_tuned({name: name == tower for name in FLAGS})
    return model


def supervise(sample, count: int):
    """Supervises the last `count` tokens of a sample, the one that ends the turn among them."""
    sample.labels = np.full_like(sample.input_ids, IGNORE)
    sample.labels[-count:] = sample.input_ids[-count:]
    return sample


def picture(seed: int, *grids):
    patches = sum(rows * columns for rows, columns in grids)
    return supervise(make_sample(seed, patches + 8, grids=grids), patches + 1)


def picture_of(sample, place: int):
    """Returns the sample with one of its slices alone."""
    queries = MEDIA.image.queries
    return EncodedSample(
        key=sample.key,
        source=sample.source,
        modality="image",
        input_ids=sample.input_ids[: 1 + queries],
        labels=np.full(1 + queries, IGNORE, np.int32),
        slices=[sample.slices[place]],
        grids=[sample.grids[place]],
        slice_starts=[1],
    )


def clip(seed: int, frames: int, words: int):
    return supervise(make_sample(seed, words + 8, clips=[frames]), words + 1)


def test_every_patch_is_a_classification_of_its_own():
    model = stand_in("patch_labels")
    samples = [picture(1, (3, 4)), picture(2, (2, 5), (4, 4))]
    batch = make_batch([samples])
    loss_sum, row_losses = model(batch)
    alone = [model.vision.vpm(make_batch([[sample]]).vision) for sample in samples[:1]]
    alone += [model.vision.vpm(make_batch([[picture_of(samples[1], i)]]).vision) for i in range(2)]
    logits = model.vision.vpm.label_head(torch.cat(alone))
    labels = np.concatenate([s.input_ids[s.labels != IGNORE][:-1] for s in samples])
    expected = F.cross_entropy(logits, torch.from_numpy(labels).long(), reduction="none")
    torch.testing.assert_close(loss_sum, expected.sum())
    ends = [12, 12 + 1 + 26]
    assert row_losses[ends].eq(0).all()
    torch.testing.assert_close(row_losses[row_losses != 0], expected)


def test_every_clip_has_the_ctc_loss_it_has_alone():
    model = stand_in("ctc")
    samples = [clip(1, 40, 3), clip(2, 25, 5), clip(3, 61, 2)]
    loss_sum, row_losses = model(make_batch([samples]))
    expected = []
    for sample in samples:
        batch = make_batch([[sample]])
        logits = model.audio.audio.ctc_head(model.audio.audio(batch.audio, project=False))
        words = torch.from_numpy(sample.input_ids[sample.labels != IGNORE][:-1]).long()
        log_probs = logits.log_softmax(-1)[:, None]
        blank = logits.shape[1] - 1
        sizes = torch.tensor([len(logits)]), torch.tensor([len(words)])
        expected.append(F.ctc_loss(log_probs, words[None], *sizes, blank=blank, reduction="sum"))
    torch.testing.assert_close(loss_sum, torch.stack(expected).sum())
    torch.testing.assert_close(row_losses.sum(), loss_sum.detach())
    torch.testing.assert_close(row_losses[0] * 4, expected[0].detach())


@pytest.mark.parametrize("objective", ["patch_labels", "ctc"])
def test_only_the_tower_and_its_head_get_gradients(objective):
    model = stand_in(objective)
    batch = make_batch([[picture(1, (3, 4))] if objective == "patch_labels" else [clip(1, 40, 3)]])
    model(batch).loss_sum.backward()
    found = gradients(model)
    tower = {"patch_labels": "vision_encoder", "ctc": "audio_encoder"}[objective]
    assert {module_of(name) for name in found} == {tower}
    assert any(name.startswith(HEADS) for name in found)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("objective", ["patch_labels", "ctc"])
def test_without_media_the_gradients_are_zeros_and_not_missing(objective):
    model = stand_in(objective)
    model(make_batch([[make_sample(1, 0)]])).loss_sum.backward()
    found = gradients(model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(not gradient.any() for gradient in found.values())


def test_the_loss_does_not_depend_on_packing():
    for objective, samples in (
        ("patch_labels", [picture(1, (3, 4)), picture(2, (2, 5))]),
        ("ctc", [clip(1, 40, 3), clip(2, 25, 5)]),
    ):
        model = stand_in(objective)
        together = model(make_batch([samples])).loss_sum
        apart = sum(model(make_batch([[sample]])).loss_sum for sample in samples)
        torch.testing.assert_close(together, apart)


def test_labels_that_do_not_match_the_patches_are_refused_by_name():
    with pytest.raises(ValueError, match=r"tiny/sample1 has 12 patches, but 9 label tokens\. Give"):
        stand_in("patch_labels")(make_batch([[supervise(make_sample(1, 30, grids=[(3, 4)]), 10)]]))


def test_labels_never_slide_from_one_picture_to_another():
    samples = [picture(n, (3, 4)) for n in range(4)]
    samples[1:3] = [supervise(make_sample(1, 30, grids=[(3, 4)]), 12), picture(2, (3, 4))]
    samples[2].labels[-14] = samples[2].input_ids[-14]  # in all, there are as many labels as patches
    with pytest.raises(ValueError) as error:
        stand_in("patch_labels")(make_batch([samples[:2], samples[2:]]))
    assert "tiny/sample1 has 12 patches, but 11 label tokens, tiny/sample2 has 12 patches, but 13" in str(
        error.value
    )
    assert "sample0" not in str(error.value) and "sample3" not in str(error.value)
    blind = make_sample(5, 9, grids=[(2, 2)])
    blind.labels[:] = IGNORE
    with pytest.raises(ValueError, match="4 patches are of samples without a label"):
        stand_in("patch_labels")(make_batch([[samples[0], blind]]))


def test_ctc_wants_one_clip_a_sample():
    two = supervise(make_sample(1, 10, clips=[20, 20]), 4)
    with pytest.raises(ValueError, match=r"tiny/sample1 has 2 clips\. Give"):
        stand_in("ctc")(make_batch([[two]]))


def test_no_transcript_is_ever_learnt_on_the_clip_of_another():
    two, none = supervise(make_sample(1, 10, clips=[20, 20]), 4), supervise(make_sample(2, 10), 4)
    for samples in ([two, none], [none, two], [clip(3, 40, 3), two, none]):
        with pytest.raises(ValueError) as error:
            stand_in("ctc")(make_batch([samples]))
        assert "tiny/sample1 has 2 clips" in str(error.value)
        assert "tiny/sample2 has 0 clips" in str(error.value) and "sample3" not in str(error.value)


def test_a_sample_dropped_in_its_place_does_not_confuse_whose_clip_is_whose():
    gone = BlankSegment(30, Dropped("tiny", "shard", "gone", "audio_corrupt", "it is damaged"))
    model = stand_in("ctc")
    samples = [clip(1, 40, 3), clip(2, 25, 5)]
    expected = model(make_batch([samples])).loss_sum
    loss_sum = model(make_batch([[gone, samples[0]], [samples[1], gone]])).loss_sum  # type: ignore[list-item]
    torch.testing.assert_close(loss_sum, expected)
