"""The large size's backbones are trained by the command and can be joined."""

from typer.testing import CliRunner

from sparsecut import build
from sparsecut.cli.main import app


def test_the_large_backbones_are_trained_by_the_command(tmp_path):
    command = ["shapes", "pretrain", "--size=large", "--quick", f"--out={tmp_path}"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "--size large --device cpu" in (tmp_path / "README.md").read_text()
    model, processor = build(str(tmp_path / "vision"), str(tmp_path / "language"))
    assert model.config.vision_depth == 12
    assert model.config.language_depth == 12
    assert processor.num_image_tokens == 64
