"""Config and corpus to this rank's microbatches: which pieces form a step, and who computes them."""

from functools import partial

from parallel import comm
from parallel.mesh import Mesh
from parallel.planner.sequence import plan_step, validate_plan

from .config.check import microbatch_tokens
from .config.memory import ITEMSIZE
from .config.schema import Config
from .data.held_out import HeldOutBatch, held_out_batches, held_out_packs
from .data.loader import Packs, StepLoader, step_packs
from .data.mixture import make_mixture
from .data.planned import PlannedLoader, Planning, planned_held_out
from .data.sources import Opened
from .data.tokenizers import load_tokenizer
from .model.step_cost import sequence_cost


def step_loader(config: Config, mesh: Mesh, opened: Opened, packs: Packs) -> StepLoader:
    """This rank's microbatches by step, under static groups or planned ones."""
    if config.step_plan.groups == "adaptive":
        rows = int(config.model.vocab_size)
        return PlannedLoader(opened.tokens, packs, _planning(config, mesh), vocab_size=rows)
    return StepLoader(
        opened.tokens,
        packs,
        data_group_index=mesh.data_group_index,
        num_data_groups=mesh.num_data_groups,
        vocab_size=int(config.model.vocab_size),
    )


def _planning(config: Config, mesh: Mesh) -> Planning:
    """Plans are made on rank 0 and serve every stage and every tp peer alike."""
    world, num_ranks = mesh.group("world"), mesh.size("data")
    cost = sequence_cost(
        config.model,
        config.step_plan,
        device=mesh.device_type,
        itemsize=ITEMSIZE[config.train.dtype],
        num_ranks=num_ranks,
    )
    pp = mesh.size("pp")
    return Planning(
        data_rank=mesh.coordinate("data"),
        plan=partial(plan_step, num_ranks=num_ranks, cost=cost, pp=pp, effort=config.step_plan.effort),
        check=partial(validate_plan, cost=cost, pp=pp),
        share=partial(comm.broadcast_json, src=0, group=world),
        leader=world.rank == 0,
    )


def make_packs(config: Config, opened: Opened) -> Packs:
    """Which pieces form each step: whole documents, or what the curriculum draws."""
    tokens = (microbatch_tokens(config), config.train.global_batch_tokens)
    if config.curriculum.kind == "none":
        return step_packs(
            opened.tokens,
            opened.train_docs,
            config.data,
            seed=config.run.seed,
            microbatch_tokens=tokens[0],
            global_batch_tokens=tokens[1],
        )
    return make_mixture(
        opened,
        config.data,
        config.curriculum,
        seed=config.run.seed,
        tokens=tokens,
        steps=config.train.steps,
    )


def held_out(config: Config, mesh: Mesh, opened: Opened) -> list[HeldOutBatch]:
    """This rank's share of every evaluation; with planned groups one plan serves all of them."""
    if not len(opened.held_out_docs):
        return []
    tokenizer = None
    if opened.tokens.text_bytes is None and opened.tokenizer is not None:
        tokenizer = load_tokenizer(opened.tokenizer)  # a foreign store: count its text by decoding it
    packs = held_out_packs(
        opened.tokens,
        opened.held_out_docs,
        config.data,
        microbatch_tokens=microbatch_tokens(config),
        eval_tokens=config.train.eval_tokens,
    )
    if config.step_plan.groups == "adaptive":
        return planned_held_out(
            opened.tokens,
            packs,
            _planning(config, mesh),
            vocab_size=int(config.model.vocab_size),
            tokenizer=tokenizer,
        )
    return held_out_batches(
        opened.tokens,
        packs,
        data_group_index=mesh.data_group_index,
        num_data_groups=mesh.num_data_groups,
        vocab_size=int(config.model.vocab_size),
        tokenizer=tokenizer,
    )
