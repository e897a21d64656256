"""Bad samples: raised or counted, never lost."""

import pickle

import pytest

from moe_vlm_jax.data import bad_samples

ERROR = bad_samples.SampleError("s3", "missing_image", "image 'a.png' does not exist; add it.")


def test_the_error_names_sample_and_fault_and_survives_a_worker_process():
    assert str(ERROR) == "sample 's3': image 'a.png' does not exist; add it."
    copy = pickle.loads(pickle.dumps(ERROR))
    assert (str(copy), copy.sample_id, copy.kind) == (str(ERROR), "s3", "missing_image")


def test_the_error_policy_raises_and_says_how_to_leave_samples_out():
    with pytest.raises(bad_samples.SampleError, match=r"'s3': .*add it\. \(data\.on_bad_sample='drop'"):
        bad_samples.BadSamples("error").handle(ERROR)


def test_a_command_with_another_name_for_the_setting_is_told_that_one():
    with pytest.raises(bad_samples.SampleError, match=r"\(on_bad_sample='drop' leaves"):
        bad_samples.BadSamples("error", "on_bad_sample").handle(ERROR)


def test_the_drop_policy_counts_by_kind_and_reports_each(caplog):
    bad = bad_samples.BadSamples("drop")
    bad.handle(ERROR)
    bad.handle(bad_samples.SampleError("s4", "missing_image", "b"))
    bad.handle(bad_samples.SampleError("s5", "turns", "c"))
    assert bad.counts == {"missing_image": 2, "turns": 1}
    with caplog.at_level("WARNING"):
        bad.report(kept=9, what="llava train")
    assert "llava train: left out 2 samples (missing_image), e.g. sample 's3'" in caplog.text
    assert "left out 1 samples (turns)" in caplog.text


def test_a_source_of_which_nothing_is_left_is_an_error():
    bad = bad_samples.BadSamples("drop")
    bad.handle(ERROR)
    with pytest.raises(ValueError, match=r"all 1 samples are unusable \(missing_image 1\); .*'s3'"):
        bad.report(kept=0, what="llava train")


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"on_bad_sample='skip' is not one of \('error', 'drop'\)"):
        bad_samples.BadSamples("skip")
