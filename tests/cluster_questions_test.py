"""The command line, on the base that ships."""

import pathlib
import subprocess
import sys

import pytest

from moe_vlm_jax.moe import question_clusters

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moe_vlm_jax.cluster_questions", "--config", "configs/sft.py"]
    return subprocess.run(
        [*command, "--config.data.num_images=20", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_command_writes_clusters_and_shows_them(tmp_path):
    done = run("--target", str(tmp_path / "c.npz"), "--num_clusters=3")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["cluster 0", "cluster 1", "cluster 2"]
    assert lines[-1] == f"clusters: {tmp_path / 'c.npz'}"
    assert len(question_clusters.read(tmp_path / "c.npz")) == 3


@pytest.mark.slow
def test_more_clusters_than_questions_end_with_one_line(tmp_path):
    done = run("--target", str(tmp_path / "c.npz"), "--num_clusters=5000", "--num_questions=7")
    assert done.returncode == 2
    assert "error: 5000 clusters are asked for, but the questions have" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c.npz").exists()
