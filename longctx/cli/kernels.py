"""`longctx doctor --kernels`: which attention kernel `auto` takes on this machine, and why not the others."""

HEAD_DIMS = (64, 128, 256)


def table() -> list[str]:
    """One block of lines per dtype: the choice for each head dim, then every kernel with its reason."""
    import torch

    from parallel.attention.backends import Needs, survey

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        words = str(dtype).removeprefix("torch.")
        for head_dim in HEAD_DIMS:
            found = survey(Needs(form="causal", device=device, dtype=dtype, head_dim=head_dim, grouped=True))
            first = next(c.kernel.name for c in found if c.usable)
            lines.append(f"{device} {words} head_dim={head_dim}: {first}")
        lines += [f"  {'can' if c.usable else 'not'} {c.kernel.name:<13} {c.reason}" for c in found]
    return lines
