#!/usr/bin/env python3
"""Writes tests/fixtures/token_types.safetensors: what PyTorch (fp32) makes of token types other than 0 with tests/fixtures/bert.

    pip install torch transformers safetensors
    scripts/make_token_types.py

    input_ids, attention_mask, token_type_ids   [4, 24]       i64, rows padded on the right, lengths of their own
    last_hidden_state                           [4, 24, 40]   f32, 0 at padding
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertModel

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
LENGTHS = (24, 17, 5, 1)


def main() -> None:
    torch.manual_seed(11)
    model = BertModel.from_pretrained(FIXTURES / "bert", attn_implementation="eager").float().eval()
    longest = max(LENGTHS)
    mask = torch.tensor([[int(place < length) for place in range(longest)] for length in LENGTHS])
    ids = torch.randint(1, model.config.vocab_size, mask.shape) * mask
    # Two segments, as of a pair of texts, in the first row; any mix in the others.
    types = torch.randint(0, model.config.type_vocab_size, mask.shape) * mask
    types[0] = (torch.arange(longest) >= longest // 2).long()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        zero = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(types)).last_hidden_state
    difference = ((hidden - zero).abs() * mask[..., None]).max().item()
    assert difference > 0.1, f"the types change too little: {difference}"
    save_file(
        {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": types,
            "last_hidden_state": (hidden * mask[..., None]).contiguous(),
        },
        FIXTURES / "token_types.safetensors",
    )
    print(f"types change hidden states by {difference:.3f} at most")


if __name__ == "__main__":
    main()
