"""Text to ids and back, with the special tokens and the chat template that a model expects."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..data.tokenizers import load_tokenizer
from ..errors import ConfigError
from ..hf.added import load_json_tokenizer
from ..hf.folder import CONFIG, TOKENIZER
from ..hf.source import Source


class Speaker(Protocol):
    """What sampling asks of a tokenizer."""

    ends: frozenset[int]
    """Ids that end a text."""

    def prompt(self, text: str, *, chat: bool) -> list[int]:
        """Ids of a prompt."""

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids."""


def speaker_of(source: Source) -> Speaker:
    """The tokenizer of a model, as its users would call it.

    Raises:
        ConfigError: there is none.
    """
    if source.companions is not None and (source.companions / TOKENIZER).is_file():
        return _HfSpeaker(source.companions)
    if source.companions is not None and source.tokenizer == str(source.companions):
        raise ConfigError(f"{source.companions} has no {TOKENIZER}; put the model's own there")
    return _RunSpeaker(source.tokenizer)


class _RunSpeaker:
    """Of a run: documents begin at once and end with one token."""

    def __init__(self, name: str) -> None:
        self._tokenizer = load_tokenizer(name)
        self.ends = frozenset([self._tokenizer.eos_id])

    def prompt(self, text: str, *, chat: bool) -> list[int]:
        """Ids of a prompt."""
        return [int(each) for each in self._tokenizer.encode(text)]

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids."""
        return self._tokenizer.decode(ids)


class _HfSpeaker:
    """Of a Hugging Face folder: special tokens by its post-processor, or its chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_json_tokenizer(folder / TOKENIZER)
        self._tokenizer.no_truncation()  # a document is continued from its end, whatever the file says
        self._tokenizer.no_padding()
        self._settings = _json(folder / "tokenizer_config.json")
        self._template = _template(folder, self._settings)
        ends = _json(folder / "generation_config.json").get("eos_token_id")
        ends = _json(folder / CONFIG).get("eos_token_id") if ends is None else ends
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def prompt(self, text: str, *, chat: bool) -> list[int]:
        """Ids of a prompt, as a user's turn where there is a chat template."""
        if not chat or self._template is None:
            return list(self._tokenizer.encode(text, add_special_tokens=True).ids)
        rendered = _render(self._template, text, self._settings)
        return list(self._tokenizer.encode(rendered, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {each.get("name"): each.get("template") for each in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _render(template: str, text: str, settings: dict[str, Any]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    tokens = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    known = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items() if v is not None}
    messages = [{"role": "user", "content": text}]
    try:
        rendered = environment.from_string(template)
        return rendered.render(messages=messages, add_generation_prompt=True, **known)
    except TemplateError as error:
        raise ConfigError(f"the model's chat template cannot be rendered ({error}); use --raw") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); repair it or take it away") from error
    return found
