"""`longctx doctor --kernels` prints the choice and every kernel's reason."""

from longctx.cli.doctor import run


def test_every_kernel_is_named_with_its_reason(capsys):
    assert run(["--kernels"]) == 0
    text = capsys.readouterr().out
    assert "bfloat16 head_dim=128: " in text
    for name in (
        "flash_attn_2",
        "flash_attn_3",
        "flash_attn_4",
        "torch_flash",
        "cudnn",
        "cpu_flash",
        "torch",
    ):
        assert f" {name} " in text
