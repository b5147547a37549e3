"""Checks of section `eval`. Pure, without torch."""

from difflib import get_close_matches

from ..errors import ConfigError
from .schema import Config, RemapConfig

GENERATORS = (
    "passkey",
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
)
"""Prompt generators of `longctx.eval.ruler`."""
TASKS = ("loss", "original", *GENERATORS)

_LOWEST = {
    "every_tokens": 0,
    "budget_s": 0,
    "documents": 1,
    "buckets": 1,
    "window": 0,
    "stride": 1,
    "depths": 1,
    "trials": 1,
}


def check_eval(config: Config) -> None:
    """Ranges, tasks and the remap.

    Raises:
        ConfigError: naming the key, its value and what to change.
    """
    section = config.eval
    for name, lowest in _LOWEST.items():
        if not getattr(section, name) >= lowest:
            raise ConfigError(f"eval.{name}={getattr(section, name)}; choose at least {lowest}")
    for task in section.tasks:
        if task not in TASKS:
            close = get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"eval.tasks names {task!r}, which is unknown; {hint}Known: {', '.join(TASKS)}")
    short = [length for length in section.lengths if length < 2]
    if short:
        raise ConfigError(f"eval.lengths has {short[0]}; a context has at least 2 tokens")
    if section.window and section.stride > section.window:
        raise ConfigError(
            f"eval.stride={section.stride} exceeds eval.window={section.window}, so tokens between "
            f"the windows would not be scored; set eval.stride to at most {section.window}"
        )
    check_remap(config)


def check_remap(config: Config) -> None:
    """The remap's own numbers, and that the model's mask leaves room for it."""
    remap = config.eval.remap
    if remap.type == "off":
        return
    if config.model.sliding_window is not None:
        raise ConfigError(
            f"eval.remap.type={remap.type} replaces the attention mask, but model.sliding_window="
            f"{config.model.sliding_window}; set eval.remap.type=off"
        )
    window = remap_window(config, remap)
    if remap.type == "string" and not 0 < remap.local < window:
        raise ConfigError(
            f"eval.remap.local={remap.local} must be positive and below eval.remap.window={window}: the far "
            "distances are shifted to begin there"
        )
    if remap.type == "self_extend" and remap.group < 1:
        raise ConfigError(f"eval.remap.group={remap.group}; choose at least 1 token, usually 4 to 32")
    if remap.type == "lm_infinite" and remap.sinks < 0:
        raise ConfigError(f"eval.remap.sinks={remap.sinks}; choose at least 0")
    _check_scales(remap)


def remap_window(config: Config, remap: RemapConfig) -> int:
    """The remap's window, or half the training length (all of it for lm_infinite).

    Raises:
        ConfigError: it exceeds the training length.
    """
    trained = config.model.rope.original_len or config.data.seq_len
    if not 0 <= remap.window <= trained:
        raise ConfigError(
            f"eval.remap.window={remap.window} is beyond the training length of {trained} tokens "
            f"(model.rope.original_len, else data.seq_len); choose 1 to {trained}, or 0 for the usual share"
        )
    return remap.window or max(1, trained if remap.type == "lm_infinite" else trained // 2)


def _check_scales(remap: RemapConfig) -> None:
    if remap.type == "dpe" and (not remap.scales or min(remap.scales) < 1):
        raise ConfigError(
            f"eval.remap.scales={list(remap.scales)}: give one whole number of at least 1 for each group "
            "of pairs, fastest first, such as [1,1,2,2,4,4,8,8]; longctx.rope.remap.search_scales finds them"
        )
