"""Write a model as llama.cpp writes it: a GGUF file with a tokenizer and a chat template."""

from gguf import GGUFWriter, TokenType
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Bytes, a merged pair, because there has to be one, and two special tokens.
VOCABULARY = 259


def gguf_name(name):
    """Translate a parameter name of Llama."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight, heads):
    """Put the rows of a rotary projection into llama.cpp's order: the halves of each head's channels take turns."""
    shape = heads, 2, weight.shape[0] // heads // 2, weight.shape[1]
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape)


def write_gguf(model, path):
    """Write a Llama with a vocabulary of VOCABULARY tokens in float32."""
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    characters = [character for _, character in sorted(bytes_to_unicode().items())]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*characters, "zq", "<bos>", "<eos>"])
    writer.add_token_types([TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["z q"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleaved(
                weight, config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            )
        writer.add_tensor(gguf_name(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
