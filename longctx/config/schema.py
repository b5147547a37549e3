"""Every key of a run: frozen dataclasses, one per section, each field with its unit and meaning.

Lengths are in tokens and sizes in bytes; in files and on the command line both accept units
(`8k` = 8192 tokens, `1M` = 1048576 tokens, `10GiB`). `auto` stands for a value that `check.resolve`
(or, for the vocabulary, the tokenizer) decides.
"""

from dataclasses import dataclass, field
from typing import Literal

from .eval_schema import EvalConfig as EvalConfig
from .eval_schema import RemapConfig as RemapConfig
from .marks import BYTES as BYTES
from .marks import TOKENS as TOKENS
from .pipeline_schema import PipelineConfig as PipelineConfig
from .recovery_schema import RecoveryConfig as RecoveryConfig
from .rope_schema import RopeConfig as RopeConfig

Auto = Literal["auto"]
Device = Literal["auto", "cpu", "cuda"]
Strategy = Literal["local", "ulysses", "ring", "usp", "allgather"]
Dtype = Literal["auto", "bfloat16", "float32", "float64"]
Curriculum = Literal[
    "none",
    "natural",
    "uniform",
    "weights",
    "grow-linear",
    "grow-p2",
    "grow-p100",
    "shrink-linear",
    "shrink-p2",
    "shrink-p100",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the run lives and on what it runs."""

    dir: str = "runs/quickstart"
    """Run folder: resolved configuration, metrics, logs, checkpoints."""
    seed: int = 0
    """Seed of the parameters and of the order of documents."""
    processes: int = 0
    """Local processes to start; 0: one per GPU, or 2 on CPU."""
    device: Device = "auto"
    """`cpu`, `cuda`, or `auto`: cuda where a GPU is visible."""
    device_memory: int | Auto = field(default="auto", metadata=BYTES)
    """Memory of one GPU in bytes for the estimate; `auto`: asked of the driver, else 80GiB; 0: no limit."""
    deterministic: bool = False
    """Only algorithms that give the same bits in every run; an operation without one is an error."""
    resume: bool = False
    """Continue the run that the folder already holds."""
    port: int = 0
    """TCP port of the local rendezvous; 0: any free port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a decoder: grouped-query attention, RMSNorm, SwiGLU, RoPE."""

    num_layers: int = 4
    """Decoder layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_size: int = 384
    """Inner width of the SwiGLU feed-forward."""
    num_heads: int = 4
    """Query heads H."""
    num_kv_heads: int = 2
    """Key and value heads K; divides `num_heads`."""
    head_dim: int = 32
    """Dims of a head D (even); num_heads x head_dim need not be `hidden_size`."""
    vocab_size: int | Auto = "auto"
    """Rows of the embedding; `auto`: the tokenizer's, rounded up to a multiple of 64."""
    rope: RopeConfig = RopeConfig()  # noqa: RUF009 -- frozen
    """Rotary position embedding."""
    norm_eps: float = 1e-5
    """Epsilon inside every RMSNorm."""
    attention_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys before RoPE (Qwen3)."""
    tied_embeddings: bool = True
    """The output head shares the embedding's weight."""
    sliding_window: int | None = field(default=None, metadata=TOKENS)
    """Tokens that a query sees back, itself included; none: all of its document."""
    dropout: float = 0.0
    """Share of what attention and feed-forward add to the stream that is dropped in training, by token."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream shrink with depth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One of several sources of documents that a curriculum mixes."""

    name: str = ""
    """Name in metrics and messages."""
    path: str = ""
    """As `data.path`."""
    weight: float = 1.0
    """Share of the tokens, up to a factor over all sources."""
    schedule: dict[str, float] = field(default_factory=dict)
    """Training progress (0 to 1) -> weight, linear between; set: replaces `weight`."""
    max_epochs: float = 0.0
    """Times that a piece may be drawn, on average; 0: any number. Then others take its share."""
    reference_loss: float = 0.0
    """Loss in nats per token above which `curriculum.reweight_every` gives it more weight."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Length class in tokens -> factor on its share of this source; set: classes not named get none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Documents, tokenizer and how documents become training sequences."""

    path: str = "python-stdlib"
    """`python-stdlib`, a folder of text, a .jsonl[.gz] file or folder of them, or a store prefix."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a tokenizer.json."""
    cache_dir: str = "data-cache"
    """Folder for tokenized stores."""
    text_key: str = "text"
    """Key that holds the document in a line of .jsonl."""
    held_out: float = 0.02
    """Fraction of the documents that is kept for evaluation and never trained on."""
    seq_len: int = field(default=8192, metadata=TOKENS)
    """Longest sequence in tokens; a longer document is cut into consecutive pieces."""
    tail: Literal["keep", "drop"] = "keep"
    """What happens to the rest of a cut document."""
    min_len: int = field(default=2, metadata=TOKENS)
    """Shortest piece in tokens that is trained on."""
    bad_files: Literal["skip", "error"] = "skip"
    """Binary or non-UTF-8 files: counted, named and skipped, or an error."""
    workers: int = 0
    """Processes that tokenize; 0: one per core."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources in the place of `path`, mixed by weight; needs `curriculum.kind`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """Documents in pieces of power-of-two lengths, drawn by length: `data.min_len` to `data.seq_len`."""

    kind: Curriculum = "none"
    """Tokens per length class. none: whole documents, packed. natural: as the corpus has them. uniform:
    alike. weights: `weights`. grow-*: each cycle goes from short to long, shrink-*: from long to short,
    with odds between neighbouring classes that rise by one (linear), double (p2) or grow 100 times."""
    mode: Literal["mixed", "one_bucket"] = "mixed"
    """Lengths of a step: of all classes, or of one."""
    cycles: int = 1
    """grow-*, shrink-*: times that lengths go through their range in the run."""
    weights: dict[str, float] = field(default_factory=dict)
    """weights: length class in tokens -> share of the tokens, up to a factor."""
    reweight_every: int = 0
    """Steps between changes of the sources' weights by their losses (`reference_loss`); 0: never."""
    too_long: Literal["longest", "spread"] = "longest"
    """Documents beyond `data.seq_len`: into pieces of that length, or of all lengths alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DegreesConfig:
    """How the work is split: degrees that multiply to the number of processes."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas that hold whole copies of the sharded state."""
    dp_shard: int | Auto = "auto"
    """Data-parallel groups that shard the state between them; `auto`: what the others leave."""
    ring: int | Auto = "auto"
    """Ranks that pass keys and values around for one sequence."""
    ulysses: int | Auto = "auto"
    """Ranks that exchange heads for tokens for one sequence."""
    tp: int = 1
    """Ranks that split every matrix."""
    ep: int = 1
    """Ranks that split the experts."""
    reshard_after_forward: bool | int | Auto = "auto"
    """FSDP after a block's forward: `true` frees its parameters, `false` keeps them until backward; a
    number n keeps them sharded over n consecutive ranks (inside a node). `auto`: false in a pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlanConfig:
    """Sequence groups of different degrees in one step, planned anew for every step's lengths."""

    groups: Literal["static", "adaptive"] = "static"
    """static: `parallel.ring` x `parallel.ulysses` for all; adaptive: planned, with both of them 1."""
    capacity_tokens: int | Auto = field(default="auto", metadata=TOKENS)
    """Tokens that one rank holds of a microbatch; `auto`: `train.microbatch_tokens`."""
    alpha1_ms: float | None = None
    """Milliseconds per squared token of a piece on one rank; none: from the model's FLOPs."""
    alpha2_ms: float | None = None
    """Milliseconds per token on one rank; none: from the model's FLOPs."""
    beta_ms: float = 0.0
    """Milliseconds of a microbatch whatever it holds (FSDP's gathers)."""
    comm_ms_per_token: dict[str, float] = field(default_factory=dict)
    """Degree -> milliseconds per token of a piece for its exchanges, and the degrees that may be used;
    empty: all powers of two, at nominal bandwidths."""
    node_ranks: int = 0
    """Processes of one node, inside which heads are exchanged; 0: as they were started."""
    effort: float = 1.0
    """Scales the number of candidates that the planner tries."""
    lockstep: bool = True
    """Every rank runs every microbatch. false: only those in which its group has tokens, so groups wait for
    each other once a step; parameters stay gathered for the whole step (memory of ZeRO-2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Attention over a split sequence."""

    strategy: Strategy = "usp"
    """How a split sequence attends; `usp` is ulysses inside ring and covers every degree."""
    layout: Literal["balanced", "zigzag", "contiguous"] = "balanced"
    """Which tokens of a packed batch each rank holds."""
    kernel: str = "auto"
    """Attention kernel; `auto`: the best that is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Optimization."""

    steps: int = 100
    """Optimizer steps."""
    global_batch_tokens: int = field(default=8192, metadata=TOKENS)
    """Token budget of one optimizer step over all processes."""
    microbatch_tokens: int | Auto = field(default="auto", metadata=TOKENS)
    """Token budget of one forward and backward of a sequence group; `auto`: `data.seq_len`."""
    dtype: Dtype = "auto"
    """Compute type of parameters and activations; `auto`: bfloat16 on cuda, float32 on cpu."""
    recompute: int | Literal["none", "full"] = "none"
    """Activation checkpointing: `none`, `full` (every block), or n for every n-th block."""
    compile: bool = False
    """Compile each block with torch.compile; the first step takes seconds to minutes longer."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate / peak learning rate."""
    warmup_steps: int = 10
    """Steps of linear warmup."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warmup; wsd: stable, then linear decay."""
    decay_fraction: float = 0.2
    """wsd: fraction of the steps that decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    on_spike: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient norm that is not finite, or beyond `spike_z`: stop, leave the batch out, or also
    go back to the newest state in memory (and further if the next batch is no better)."""
    spike_z: float = 0.0
    """Robust z-score over the last 64 steps that counts as a spike; 0: only what is not finite does."""
    max_spikes: int = 8
    """Spikes that are answered in a run; one more ends it with exit code 65."""
    skip_batches: list[int] = field(default_factory=list)
    """Batches, counted from 0, that are left out."""
    eval_every: int = 0
    """Steps between held-out evaluations; 0: only at the end."""
    eval_tokens: int = field(default=65536, metadata=TOKENS)
    """Held-out tokens of one evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Latest checkpoints that stay on disk; 0: all."""
    milestone_every: int = 0
    """Checkpoints whose step is a multiple of this stay for good; 0: none do."""
    dir: str = "auto"
    """Folder of the checkpoints, or an fsspec URL such as `s3://bucket/run`; `auto`: `ckpt` in `run.dir`."""
    background: bool = True
    """Train on while a copy of the state in host memory is written; false: wait until it is on disk."""
    grace_s: float = 0.0
    """Seconds between a stop signal and the kill; 0: unknown. Where a step and a save take longer, the run
    saves in the background all the time, whatever `every` says. Launchers set it from `site.grace`."""
    codec: Literal["none", "zstd"] = "none"
    """zstd: smaller files without loss, exponents and mantissas packed apart; slower to write and read."""
    init_from: str = ""
    """Weights to begin with: a folder of `longctx import`, a Hugging Face folder, or a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """What is written about the run, and where."""

    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    wandb: Literal["off", "auto", "offline", "online"] = "off"
    """Weights & Biases; `auto`: online with a login, offline without."""
    project: str = "longctx"
    """Weights & Biases project."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run, whole. Nothing below `build.py` sees it: each part takes its section."""

    run: RunConfig = RunConfig()
    """Where the run lives and on what it runs."""
    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    data: DataConfig = DataConfig()
    """Documents and sequences."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Lengths of the sequences of each step."""
    parallel: DegreesConfig = DegreesConfig()
    """How the work is split."""
    pipeline: PipelineConfig = PipelineConfig()  # noqa: RUF009 -- frozen
    """Schedule of the stages."""
    step_plan: StepPlanConfig = StepPlanConfig()
    """Sequence groups of each step."""
    attention: AttentionConfig = AttentionConfig()
    """Attention over a split sequence."""
    train: TrainConfig = TrainConfig()
    """Optimization."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    recovery: RecoveryConfig = RecoveryConfig()  # noqa: RUF009 -- frozen
    """Lost ranks."""
    eval: EvalConfig = EvalConfig()  # noqa: RUF009 -- frozen
    """Evaluation by position."""
    metrics: MetricsConfig = MetricsConfig()
    """What is written about the run."""
