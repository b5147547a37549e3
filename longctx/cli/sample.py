"""`longctx sample SOURCE`."""

import json
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..protocol import DONE
from .rendezvous import torchrun_world
from .start import under_torchrun
from .words import add_json, make_words_parser
from .worker import device_type

if TYPE_CHECKING:
    from ..infer.loaded import Loaded
    from ..infer.prompt import Speaker


def run(argv: Sequence[str]) -> int:
    """Continue a prompt: in this process, or split over torchrun's."""
    options = _parse(argv)
    text = _prompt(options)
    from ..hf.source import open_source
    from ..infer.loaded import alone, load_model
    from ..infer.prompt import speaker_of

    source = open_source(options.source)
    speaker = speaker_of(source)
    ids = speaker.prompt(text, chat=not options.raw and options.file is None)
    import torch

    device = device_type(options.device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    world = torchrun_world(device) if under_torchrun() else alone(torch.device(device))
    if options.dtype == "auto":
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    else:
        dtype = getattr(torch, options.dtype)
    started = time.perf_counter()
    loaded = load_model(source, world, dtype)
    try:
        load_s = time.perf_counter() - started
        row = _speak(loaded, speaker, ids, options)
    finally:
        loaded.close()
    if options.json and world.rank == 0:
        print(json.dumps({"source": source.where, "prompt_tokens": len(ids), **row, "load_s": load_s}))
    return DONE


def _parse(argv: Sequence[str]) -> Namespace:
    parser = make_words_parser(
        "sample",
        "SOURCE (--prompt TEXT | --file DOC) [--max-new N] [--temperature X] [--seed N] [--raw] [--json]",
        "Continue a prompt. SOURCE: a run folder (its newest good checkpoint), a checkpoint, an import, a\n"
        "Hugging Face folder or hub id. Under torchrun the parameters are split over the processes.",
    )
    parser.add_argument("source", help="what holds the model")
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue, or to answer after --file")
    parser.add_argument("--file", type=Path, metavar="DOC", help="a document to continue")
    parser.add_argument("--max-new", type=int, default=200, metavar="N", help="most new tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 (default): greedy")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("--raw", action="store_true", help="no chat template, where the model has one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32", "float64"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add_json(parser)
    options = parser.parse_args(list(argv))
    if options.prompt is None and options.file is None:
        parser.error("give --prompt TEXT or --file DOC")
    if options.max_new < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--max-new is at least 1, --temperature at least 0")
    return options


def _prompt(options: Namespace) -> str:
    prompt = "" if options.prompt is None else str(options.prompt)
    if not prompt.isascii() and prompt != prompt.encode(errors="replace").decode():
        raise ConfigError("--prompt holds bytes that are no UTF-8; write text to a file and use --file")
    if options.file is None:
        return prompt
    try:
        document = options.file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--file {options.file} cannot be read ({error}); name a text file") from error
    return str(document) if options.prompt is None else f"{document}\n\n{prompt}"


def _speak(loaded: "Loaded", speaker: "Speaker", ids: list[int], options: Namespace) -> dict[str, Any]:
    """Generate, printing as it goes unless a line of JSON is wanted."""
    from ..infer.generate import generate

    aloud = not options.json and int(os.environ.get("RANK", "0")) == 0
    new: list[int] = []
    said = ""
    started = time.perf_counter()
    stop = "length"
    for token in generate(
        loaded, ids, max_new=options.max_new, temperature=options.temperature, seed=options.seed
    ):
        if token in speaker.ends:
            stop = "end"
            break
        new.append(token)
        text = speaker.text(new)
        whole = text.rstrip("\ufffd")  # a character may come in several tokens
        if aloud and whole.startswith(said):
            print(whole[len(said) :], end="", flush=True)
            said = whole
    if aloud:
        print()
    seconds = time.perf_counter() - started
    return {
        "text": speaker.text(new),
        "tokens": new,
        "stop": stop,
        "tokens_per_s": len(new) / seconds if seconds else 0.0,
    }
