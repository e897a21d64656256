"""The chat command with lines from a pipe: answers alone on standard output, the same as `generate` gives."""

import io

import pytest
from PIL import Image

from moe_vlm_jax import chat, generate, ready
from tests.serving import tiny_model

QUESTIONS = ["how many items are shown ?", "which item is largest ?"]


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(ready, "from_workdir", lambda workdir: tiny_model.source())

    def run(*arguments: str, lines: tuple[str, ...] = ()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = chat.main(["--workdir", "run", *arguments])
        return status, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_lines_of_a_pipe_are_answered(run, tmp_path, capsys):
    Image.new("RGB", (16, 16), (200, 10, 40)).save(tmp_path / "a b.png")
    shown = f"/image {tmp_path}/a b.png"
    lines = (shown, QUESTIONS[0], "/reset", QUESTIONS[1], "zebras ?", "/reset", shown, QUESTIONS[1])
    status, out, err = run("--max-new-tokens", "6", lines=lines)
    assert status == 1
    assert "does not know 'zebras'" in err
    asked = [(QUESTIONS[0], True), (QUESTIONS[1], False), (QUESTIONS[1], True)]
    alone = []
    for question, has_image in asked:
        image = ["--image", str(tmp_path / "a b.png")] if has_image else []
        generate.main(["--workdir", "run", "--question", question, *image, "--max-new-tokens", "6"])
        alone.append(capsys.readouterr().out)
    assert out == "".join(alone)
    assert len(set(alone)) > 1
    assert run(lines=("/help",))[0] == 0


def test_a_mistake_on_the_command_line_is_one_line(run):
    for arguments, message in (
        (["--cache-length", "99"], "--cache-length 99 must lie in 2..40"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--template", "phi"], "--template has no effect with --workdir"),
    ):
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1) and message in err
