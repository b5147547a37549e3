"""Stand-ins for GPU attention libraries: their published signatures around plain torch.

A stub has exactly the parameters, order and defaults that the library's source has, so an adapter that
passes a wrong name, order or layout fails on any machine. The bodies follow the libraries' rules:
windows and causal masks are counted from the bottom-right corner, -1 (or None) is unbounded,
gradients go into given buffers where the library does that.
"""

from types import ModuleType

import torch


def _seen(rows, columns, causal, left, right):
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
    end = i + columns - rows
    left = None if left is not None and left < 0 else left
    right = None if right is not None and right < 0 else right
    right = 0 if causal else right
    seen = torch.ones(rows, columns, dtype=torch.bool)
    seen &= True if left is None else j >= end - left
    return seen & (True if right is None else j <= end + right)


def _sequences(q, k, cu_q, cu_k, max_q, max_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert (int(cu_q[-1]), int(cu_k[-1])) == (q.shape[0], k.shape[0]), "offsets do not end at the rows"
    assert int(cu_q.diff().max()) == max_q and int(cu_k.diff().max()) == max_k
    assert q.stride(-1) == 1 and k.stride(-1) == 1
    pairs = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in pairs]


def dense_forward(q, k, v, seen, scale):
    """One sequence: [n, H, D], [m, K, D] -> out [n, H, D], lse [H, n]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->hnm", q, k) * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v), logits.logsumexp(-1)


def dense_backward(dout, q, k, v, out, lse, seen, scale):  # noqa: PLR0913 -- the formula's arguments
    """Gradients given an lse that may cover more keys than these."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->hnm", q, keys) * scale
    p = (logits - lse[..., None]).exp() * seen
    dp = torch.einsum("nhd,mhd->hnm", dout, values)
    ds = p * (dp - (dout * out).sum(-1).t()[..., None]) * scale
    dk, dv = torch.einsum("hnm,nhd->mhd", ds, q), torch.einsum("hnm,nhd->mhd", p, dout)
    shared = (k.shape[0], k.shape[1], groups, k.shape[2])
    return torch.einsum("hnm,mhd->nhd", ds, keys), *(x.reshape(shared).sum(2) for x in (dk, dv))


def varlen_forward(q, k, v, cu, most, scale, band):  # noqa: PLR0913 -- see dense_forward
    """All sequences; band is (causal, left, right)."""
    out, lse = torch.empty_like(q), q.new_full((q.shape[1], q.shape[0]), torch.nan)
    for rows, columns in _sequences(q, k, *cu, *most):
        seen = _seen(rows.stop - rows.start, columns.stop - columns.start, *band)
        out[rows], lse[:, rows] = dense_forward(q[rows], k[columns], v[columns], seen, scale)
    return out, lse


def varlen_backward(tensors, cu, most, scale, band):
    """All sequences."""
    dout, q, k, v, out, lse = tensors
    assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for rows, columns in _sequences(q, k, *cu, *most):
        seen = _seen(rows.stop - rows.start, columns.stop - columns.start, *band)
        dq[rows], dk[columns], dv[columns] = dense_backward(
            dout[rows], q[rows], k[columns], v[columns], out[rows], lse[:, rows], seen, scale
        )
    return dq, dk, dv


def _fill(targets, gradients):
    for target, gradient in zip(targets, gradients, strict=True):
        assert target.is_contiguous()
        target.copy_(gradient)


def flash_attn_2():
    """flash-attn 2.7.4.post1 and 2.8.3, flash_attn/flash_attn_interface.py."""

    def _wrapped_flash_attn_varlen_forward(  # noqa: PLR0913
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        band = (causal, window_size_left, window_size_right)
        out, lse = varlen_forward(q, k, v, cu, most, softmax_scale, band)
        return out, lse, torch.empty(0), torch.empty(2)

    def _wrapped_flash_attn_varlen_backward(  # noqa: PLR0913
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, False)
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        band = (causal, window_size_left, window_size_right)
        grads = varlen_backward((dout, q, k, v, out, softmax_lse), cu, most, softmax_scale, band)
        _fill((dq, dk, dv), grads)
        return torch.empty(0)

    return _module(
        "flash_attn.flash_attn_interface",
        _wrapped_flash_attn_varlen_forward,
        _wrapped_flash_attn_varlen_backward,
    )


def flash_attn_3_tuple_window():
    """hopper/flash_attn_interface.py in the source archive of flash-attn 2.8.3."""

    def _flash_attn_forward(  # noqa: PLR0913
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin,
        seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1,
        pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        found = varlen_forward(q, k, v, cu, most, softmax_scale, (causal, *window_size))
        return *found, None, None

    def _flash_attn_backward(  # noqa: PLR0913
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
        max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0,
        deterministic=False, sm_margin=0,
    ):  # fmt: skip
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        tensors = (dout, q, k, v, out, softmax_lse)
        _fill((dq, dk, dv), varlen_backward(tensors, cu, most, softmax_scale, (causal, *window_size)))
        return dq, dk, dv, torch.empty(0)

    return _module("flash_attn_interface", _flash_attn_forward, _flash_attn_backward)


class _Operator:
    """A torch custom operator as seen from Python: its own signature is (*args, **kwargs)."""

    def __init__(self, function):
        self._function = function
        self.__name__ = function.__name__

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)


def flash_attn_3_operator():
    """hopper/flash_attn_interface.py at commit 01afd16d of Dao-AILab/flash-attention."""

    def _flash_attn_forward(  # noqa: PLR0913
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None,
        seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        band = (causal, window_size_left, window_size_right)
        found = varlen_forward(q, k, v, cu, most, softmax_scale, band)
        return *found, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(  # noqa: PLR0913
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        band = (is_causal, window_size_left, window_size_right)
        grads = varlen_backward((dout, q, k, v, out, softmax_lse), cu, most, softmax_scale, band)
        _fill((dq, dk, dv), grads)
        return torch.empty(0)

    return _module("flash_attn_interface", _Operator(_flash_attn_forward), _Operator(_flash_attn_backward))


def flash_attn_4():
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py."""

    def _flash_attn_fwd(  # noqa: PLR0913
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
        causal=False, softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None,
        tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None,
        _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None,
        lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None, v_descale=None,
        gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        band = (causal, window_size_left, window_size_right)
        out, lse = varlen_forward(q, k, v, cu, most, softmax_scale, band)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(  # noqa: PLR0913
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False,
        num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False,
        AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None,
        dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
        aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None,
    ):  # fmt: skip
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        band = (causal, window_size_left, window_size_right)
        return varlen_backward((dout, q, k, v, out, lse), cu, most, softmax_scale, band)

    return _module("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)


def _module(name, *functions):
    module = ModuleType(name)
    for function in functions:
        setattr(module, function.__name__, function)
    return module
