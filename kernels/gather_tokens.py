"""The input token of each row: sent by the host, or still on the device as the last token its sequence
produced.

    out[t] = host_tokens[t]                  if host_tokens[t] >= 0
             last_token[sequence_slots[t]]   else, where the row has a sequence
             0                               else (padding)

So step n+1 can be launched before the tokens of step n have reached the host. It is the first kernel of a step and starts only when
everything before it has ended: the kernels behind it, which start early (kernels/launch.py), rely on that.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_tensor

BLOCK = 256
TOKEN_DTYPES = (torch.int32, torch.int64)


@triton.jit
def _gather_tokens_kernel(host_tokens, last_token, sequence_slots, out, tokens, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < tokens
    sent = tl.load(host_tokens + t, mask=inside, other=0)
    slot = tl.load(sequence_slots + t, mask=inside, other=-1)
    produced = tl.load(last_token + slot, mask=(sent < 0) & (slot >= 0), other=0)
    dtype = out.dtype.element_ty
    tl.store(out + t, tl.where(sent >= 0, sent.to(dtype), produced.to(dtype)), mask=inside)


def gather_tokens(
    host_tokens: torch.Tensor, last_token: torch.Tensor, sequence_slots: torch.Tensor, *, out: torch.Tensor
) -> torch.Tensor:
    """Write each row's input token to `out`.

    host_tokens: [T] int32, −1 where the token is on the device. last_token: [S] int32 or int64, by sequence
    slot.
    sequence_slots: [T] int32, −1 for padding. out: [T] int32 or int64.
    Returns out. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = host_tokens.device
    check_tensor("host_tokens", host_tokens, shape=(None,), dtypes=(torch.int32,), device=device)
    check_tensor("last_token", last_token, shape=(None,), dtypes=TOKEN_DTYPES, device=device)
    check_tensor(
        "sequence_slots", sequence_slots, shape=host_tokens.shape, dtypes=(torch.int32,), device=device
    )
    check_tensor("out", out, shape=host_tokens.shape, dtypes=TOKEN_DTYPES, device=device)
    tokens = host_tokens.shape[0]
    if tokens:
        grid = (triton.cdiv(tokens, BLOCK),)
        _gather_tokens_kernel[grid](
            host_tokens, last_token, sequence_slots, out, tokens, BLOCK=BLOCK, num_warps=4
        )
    return out
