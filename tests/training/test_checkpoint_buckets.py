"""Checkpoints in a bucket: the same promises as in a folder, though nothing can be renamed there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import Bucket

from nla_jax.files import as_path
from nla_jax.training.checkpoint import Checkpoints
from nla_jax.training.checkpoint_files import CheckpointError, describe, verify


def tree(seed: int) -> dict:
    draw = np.random.default_rng(seed).standard_normal
    return {
        "embed": jnp.asarray(draw((64, 8)), jnp.float32),
        "blocks": {"kernel": jnp.asarray(draw(8), jnp.float32)},
    }


def names_in(folder: str) -> set[str]:
    """The first parts of the names of all objects below a folder of the bucket."""
    start = f"bucket/{folder}/"
    return {name.removeprefix(start).split("/")[0] for name in Bucket.objects if name.startswith(start)}


def in_bucket(bucket: str, **more) -> Checkpoints:
    return Checkpoints(as_path(f"{bucket}/run/checkpoints/rl"), digest="d", **more)


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_in_a_bucket(bucket, background):
    checkpoints, states = (
        in_bucket(bucket, background=background),
        {s: {"av": tree(s)} for s in (1, 2, 3, 4)},
    )
    assert checkpoints.latest() is None and checkpoints.pinned() is None
    for step, trees in states.items():
        checkpoints.save(step, trees, {"step": step}, pin=step == 1)
    checkpoints.wait()
    assert names_in("run/checkpoints/rl") == {"1", "3", "4", "pinned"}
    assert (checkpoints.latest(), checkpoints.pinned()) == (4, 1)
    for step in (1, 3, 4):
        restored, extra = in_bucket(bucket).restore({"av": states[step]["av"]}, step)
        jax.tree.map(np.testing.assert_array_equal, restored["av"], states[step]["av"])
        assert extra == {"step": step}
    run = as_path(f"{bucket}/run")
    for place in (run, run / "checkpoints", run / "checkpoints" / "rl", run / "checkpoints" / "rl" / "4"):
        found = describe(place)
        assert [(d.step, d.pinned) for d in found][-1] == (4, False)
        verify(found[-1])


def test_a_kill_during_a_save_or_a_deletion_in_a_bucket_leaves_no_checkpoint(bucket):
    """Orbax writes the commit object last, and a deletion takes it first: without it the rest is a leftover."""
    checkpoints, state = in_bucket(bucket), {"av": tree(0)}
    for step in (1, 2):
        checkpoints.save(step, state, {})
    del Bucket.objects["bucket/run/checkpoints/rl/2/commit_success.txt"]
    again = in_bucket(bucket)
    assert again.latest() == 1
    assert [d.step for d in describe(as_path(f"{bucket}/run"))] == [1]
    assert names_in("run/checkpoints/rl") == {"1", "2"}
    again.save(2, state, {"again": True})
    assert again.restore({"av": state["av"]})[1] == {"again": True}


def test_a_save_into_a_bucket_that_fails_leaves_the_one_before(bucket, monkeypatch):
    checkpoints, state = in_bucket(bucket), {"av": tree(0)}
    checkpoints.save(1, state, {})

    def refuse(key, data):
        raise OSError("quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_object", refuse)
        with pytest.raises(
            CheckpointError, match=r"could not write step 2 to gs://bucket/run/.*; step 1 is intact"
        ):
            checkpoints.save(2, state, {})
    assert names_in("run/checkpoints/rl") == {"1"}
    assert in_bucket(bucket).latest() == 1


def test_a_damaged_object_is_noticed(bucket):
    checkpoints, state = in_bucket(bucket), {"av": tree(0)}
    checkpoints.save(1, state, {})
    data = max(
        (name for name in Bucket.objects if "/av/d/" in name), key=lambda name: len(Bucket.objects[name])
    )
    Bucket.put_object(data, Bucket.objects[data][:-100])
    with pytest.raises(CheckpointError, match=r"could not read gs://bucket/run/checkpoints/rl/1"):
        checkpoints.restore({"av": state["av"]})


def test_checkpoints_in_another_store_are_refused(bucket):
    folder = type(as_path(bucket))("s3://bucket/run")
    with pytest.raises(ValueError, match=r"cannot be written to s3://bucket/run, only to gs:// or a folder"):
        Checkpoints(folder, digest="d")
