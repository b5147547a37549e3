"""Random tiny models of every family as transformers saves them, with a tokenizer."""

import json

import torch
from safetensors import safe_open

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
VOCAB = 300
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rope_parameters": ROPE}),
    "llama3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"rope_parameters": ROPE, "sliding_window": 9}),
    "qwen2": ("Qwen2", {"rope_parameters": ROPE}),
    "qwen2.5": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": ROPE, "head_dim": 16}),
}


def make_model(family: str, seed: int = 0):
    import transformers

    name, keys = FAMILIES[family]
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "eos_token_id": 256,
        "bos_token_id": None,
    }
    config = getattr(transformers, f"{name}Config")(**(shape | keys))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def save_model(family: str, folder, *, dtype=torch.float32, shard: str = "5GB", tokenizer: bool = True):
    """The model in `folder`, and the model itself."""
    from longctx.hf.exporting import bytes_tokenizer

    model = make_model(family).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for name, content in bytes_tokenizer().items() if tokenizer else ():
        if name != "generation_config.json":
            (folder / name).write_bytes(content)
    return model


def edit_config(folder, **changes):
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found
