"""`longctx ckpt ls | verify | prune | merge`."""

import json
from collections.abc import Sequence
from typing import Any

from ..config.units import format_bytes
from ..errors import CheckpointError, ConfigError
from ..protocol import DONE, FAILED
from .words import add_json, make_words_parser, new_folder


def run(argv: Sequence[str]) -> int:
    """Look after the checkpoints of a run."""
    words = {"ls": _ls, "verify": _verify, "prune": _prune, "merge": _merge}
    parser = make_words_parser(
        "ckpt",
        "ls|verify|prune|merge ...",
        "ls RUN: its checkpoints. verify RUN|CHECKPOINT: every byte of them. prune RUN --keep K: all but\n"
        "the latest K and milestones. merge CHECKPOINT CHECKPOINT ... --out FOLDER: average their weights.",
    )
    parser.add_argument("word", choices=words)
    word: str = parser.parse_args(list(argv[:1])).word
    return words[word](argv[1:])


def _ls(argv: Sequence[str]) -> int:
    parser = make_words_parser("ckpt ls", "RUN [--json]", "The checkpoints of a run, oldest first.")
    parser.add_argument("source", help="run folder, folder of checkpoints, or URL")
    add_json(parser)
    options = parser.parse_args(list(argv))
    rows = [_row(path) for path in _paths(options.source)]
    if options.json:
        print(json.dumps({"checkpoints": rows}))
        return DONE
    for row in rows:
        size = format_bytes(row["bytes"]) if "bytes" in row else row["error"]
        ratio = f", packed {row['ratio']:.2f} times" if row.get("ratio", 1.0) != 1.0 else ""
        print(f"{row['path']}  {row.get('kind', 'damaged')}  {size}{ratio}")
    return DONE


def _row(path: str) -> dict[str, Any]:
    from ..checkpoint.manifest import open_checkpoint

    try:
        opened = open_checkpoint(path)
    except CheckpointError as error:
        return {"path": path, "error": str(error)}
    stored = sum(entry["bytes"] for entry in opened.manifest["files"].values())
    plain = sum(each.num_bytes for each in opened.index.tensors.values())
    coded = any(piece.coded for each in opened.index.tensors.values() for piece in each.pieces)
    kind, step = opened.manifest["kind"], opened.manifest["step"]
    return {
        "path": path,
        "step": step,
        "kind": kind,
        "bytes": stored,
        "ratio": round(plain / stored, 3) if coded else 1.0,
    }


def _verify(argv: Sequence[str]) -> int:
    parser = make_words_parser("ckpt verify", "RUN|CHECKPOINT [--json]", "Read and compare every byte.")
    parser.add_argument("source", help="run folder, folder of checkpoints, one checkpoint, or URL")
    add_json(parser)
    options = parser.parse_args(list(argv))
    from ..checkpoint.manifest import verify

    rows: list[dict[str, Any]] = []
    for path in _paths(options.source):
        try:
            verify(path)
            rows.append({"path": path, "good": True})
        except CheckpointError as error:
            rows.append({"path": path, "good": False, "error": str(error)})
    if options.json:
        print(json.dumps({"checkpoints": rows}))
    else:
        for row in rows:
            print(f"{row['path']}  {'good' if row['good'] else row['error']}")
    return DONE if all(row["good"] for row in rows) else FAILED


def _prune(argv: Sequence[str]) -> int:
    parser = make_words_parser(
        "ckpt prune",
        "RUN --keep K [--milestone-every N] [--dry-run] [--json]",
        "Delete all but the latest K checkpoints and those whose step is a multiple of N.",
    )
    parser.add_argument("source", help="run folder, folder of checkpoints, or URL")
    parser.add_argument("--keep", type=int, required=True, metavar="K", help="latest that stay, at least 1")
    parser.add_argument("--milestone-every", type=int, default=0, metavar="N", help="0 (default): none")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    add_json(parser)
    options = parser.parse_args(list(argv))
    if options.keep < 1 or options.milestone_every < 0:
        parser.error("--keep is at least 1, --milestone-every at least 0")
    from ..checkpoint.keeping import prunable, remove
    from ..checkpoint.manifest import verify

    found = _paths(options.source)
    paths = prunable(found, keep=options.keep, milestone_every=options.milestone_every)
    kept = [path for path in found if path not in paths]
    if paths:
        verify(kept[-1])  # never delete the last good one
    for path in paths if not options.dry_run else ():
        remove(path)
    if options.json:
        print(json.dumps({"removed": paths, "kept": kept, "dry_run": options.dry_run}))
    else:
        print("\n".join(f"{'would remove' if options.dry_run else 'removed'} {path}" for path in paths))
    return DONE


def _merge(argv: Sequence[str]) -> int:
    parser = make_words_parser(
        "ckpt merge",
        "CHECKPOINT CHECKPOINT ... --out FOLDER [--json]",
        "Average the weights of several checkpoints of one model.",
    )
    parser.add_argument("sources", nargs="+", help="checkpoints, runs, imports or Hugging Face folders")
    parser.add_argument("--out", type=new_folder, required=True, metavar="FOLDER", help="new folder")
    add_json(parser)
    options = parser.parse_args(list(argv))
    from ..hf.merging import merge
    from ..hf.source import open_source

    written = merge([open_source(each) for each in options.sources], options.out)
    row = {"path": str(written.path), "bytes": written.num_bytes, "merged": len(options.sources)}
    print(json.dumps(row) if options.json else f"{written.path}: average of {len(options.sources)}")
    return DONE


def _paths(source: str) -> list[str]:
    """The checkpoints that a name means."""
    from ..checkpoint.keeping import checkpoints_below
    from ..checkpoint.manifest import MANIFEST
    from ..tensors.folder import folder_at

    if folder_at(source).size(MANIFEST) is not None:
        return [source]
    found = [str(path) for path in checkpoints_below(source)]
    if not found:
        raise ConfigError(f"{source} holds no checkpoints (no step-*/manifest.json); name a run folder")
    return found
