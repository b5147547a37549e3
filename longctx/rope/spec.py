"""The keys of each method; they live with the configuration, so that it can check itself."""

from ..config.rope import (
    METHOD_KEYS,
    Keys,
    check_rope,
    extension_factor,
    rotary_dim,
    with_head_dim,
)

__all__ = ["METHOD_KEYS", "Keys", "check_rope", "extension_factor", "rotary_dim", "with_head_dim"]
