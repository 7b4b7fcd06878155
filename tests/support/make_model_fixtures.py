# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "transformers==5.24.0", "tokenizers==0.23.3", "numpy", "accelerate", "gguf", "safetensors", "jinja2"
# ]
# ///
"""Writes tests/fixtures/: what transformers (PyTorch, float32, eager attention) says about models our code must agree on.

    uv run --script tests/support/make_model_fixtures.py GGUF     # about 5 minutes, in an environment of its own, with torch

GGUF is the file of the demo model: `uv run python -c "from jaxlora.checkpoints.load import *; print(smollm2_path())"`.
Nothing of ours is imported.  The format of what is written is at the top of small_world.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
GREEDY_TOKENS = 64
SAMPLED_IDS = 256

TEXTS = [
    "The capital of France is",
    "x² + y² = z², so 1½ of ¼ is ⅜.",
    "Full-width digits １２３ and Arabic ٤٥٦ beside 2024 and १२३.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    'for (int i = 0; i < 10; i++) {\n\tprintf("%d\\n", i);\n}',
    "Привет, как твои дела сегодня?",
    "今日はいい天気ですね。明日も",
    "مرحبا بالعالم، كيف",
    "Ὦ ξεῖν', ἀγγέλλειν Λακεδαιμονίοις",
    "Emoji: 🙂👩‍🚀🇫🇷 and accents: naïve café ﬁn",
    "   leading spaces,\ttabs\t\tand\r\nline ends\n\n\n  here  ",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "It's they're WE'LL don't I'd",
    "1234567890 3.14159 1,000,000",
    "Q",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "2+2?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another, with ² and ½?"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "  spaces around  \n"}],
    [{"role": "user", "content": "Write <|im_end|> and <b>&amp;</b> {{ braces }}"}],
    [
        {"role": "system", "content": "Sei höflich. 礼儀正しく。"},
        {"role": "user", "content": "Grüß Gott"},
        {"role": "assistant", "content": "Grüß Gott! Wie geht’s? "},
    ],
]
# Written by us to use what real templates use: whitespace control, namespaces, loop controls, filters, helpers.
TEMPLATES = {
    "blocks": """{%- set ns = namespace(seen=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- set ns.seen = ns.seen + 1 %}
    {% if message.role == 'system' %}
[SYS]{{ message['content'] | trim }}[/SYS]
    {% elif message['role'] == 'user' %}
[U{{ ns.seen }}]{{ message.content }}[/U]
    {% else %}
{% generation %}[A]{{ message.content }}[/A]{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
[A]{% endif %}""",
    "json": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}\n{% endfor %}"
    "{{ messages | map(attribute='role') | join('>') }}{{ tools is none }}{{ documents is defined }}",
    "strict": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'].strip() }}\n{% endfor %}",
}


def smollm2_tokenizer(gguf: Path):
    """transformers' tokenizer of the file, with the digit splitting that its conversion drops put back."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = words
    tokenizer.backend_tokenizer.normalizer = None
    got = [word for word, _ in words.pre_tokenize_str("a12²½３٤ b")]
    expected = [
        "a",
        "1",
        "2",
        "Â²",
        "Â½",
        "ï¼ĵ",
        "Ù¤",
        "Ġb",
    ]  # every numeric character alone; bytes as GPT-2 shows them
    assert got == expected, got
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
    return tokenizer


def write_smollm2(gguf: Path) -> None:
    """smollm2.json and smollm2.npz."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = smollm2_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    chats = [
        {
            "messages": messages,
            "text": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            "ids": list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]),
            "text_without_prompt": tokenizer.apply_chat_template(messages, tokenize=False),
            "text_continued": tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True),
        }
        for messages in CONVERSATIONS
    ]
    prompts = [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS]
    prompts += [{"text": chat["text"], "ids": chat["ids"]} for chat in chats[:5]]
    sample_V = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, SAMPLED_IDS, replace=False))
    arrays = {"sampled_ids": sample_V.astype(np.int32)}
    for i, prompt in enumerate(prompts):
        logits_TV, token_64, margin_64 = greedy(model, prompt["ids"])
        arrays[f"ids_{i}"] = np.array(prompt["ids"], np.int32)
        arrays[f"logits_{i}"] = logits_TV[:, sample_V]
        arrays[f"greedy_{i}"], arrays[f"margin_{i}"] = token_64, margin_64
        if i in (0, 2, 15):
            arrays[f"last_{i}"] = logits_TV[-1]
        print(repr(prompt["text"][:40]), "->", repr(tokenizer.decode(token_64)[:60]))
    np.savez_compressed(FIXTURES / "smollm2.npz", **arrays)
    write_json(FIXTURES / "smollm2.json", {"prompts": prompts, "chats": chats})


def greedy(model, ids: list[int]):
    """(logits [T, V] of the prompt, 64 greedy tokens, how far each is above the second best).  eos does not stop it."""
    import numpy as np
    import torch

    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=True)
        prompt_TV = out.logits[0].numpy()
        tokens, margins = [], []
        for _ in range(GREEDY_TOKENS):
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return prompt_TV, np.array(tokens, np.int32), np.array(margins, np.float32)


def tiny_models() -> dict[str, object]:
    """Configurations by folder name; every family once, every feature that differs once."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    size = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return {
        "tiny-llama-tied": LlamaConfig(
            **size | {"vocab_size": 320}, tie_word_embeddings=True, rope_parameters=plain, rms_norm_eps=1e-5
        ),
        "tiny-llama-rope": LlamaConfig(**size, head_dim=16, rope_parameters=llama3, rms_norm_eps=1e-5),
        "tiny-mistral": MistralConfig(**size, sliding_window=4, rope_parameters=plain, rms_norm_eps=1e-5),
        "tiny-qwen2": Qwen2Config(**size, tie_word_embeddings=True, rope_parameters=plain, rms_norm_eps=1e-6),
        "tiny-qwen3": Qwen3Config(**size, head_dim=16, rope_parameters=plain, rms_norm_eps=1e-6),
    }


def write_tiny(name: str, config) -> None:
    """A checkpoint with random weights and expected.npz.  tiny-qwen2 is bfloat16, tiny-qwen3 lies in two shards."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn_like(p)
            if key.endswith("norm.weight"):
                p.copy_(1 + 0.4 * noise)
            elif p.ndim == 1:
                p.copy_(0.5 * noise)  # biases
            else:
                p.copy_(noise if "embed" in key else 1.5 * noise / p.shape[1] ** 0.5)
    if name == "tiny-qwen2":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="80KB" if name == "tiny-qwen3" else "1GB")
    shards = len(list(folder.glob("*.safetensors")))
    assert shards == (2 if name == "tiny-qwen3" else 1), shards
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    rng = np.random.default_rng(1)
    arrays = {}
    for i, length in enumerate((1, 7, 24, 60)):
        ids_T = rng.integers(0, config.vocab_size, length).astype(np.int32)
        with torch.no_grad():
            arrays[f"logits_{i}"] = model(torch.tensor(ids_T[None].astype(np.int64))).logits[0].numpy()
        arrays[f"ids_{i}"] = ids_T
    np.savez_compressed(folder / "expected.npz", **arrays)
    print(name, shards, "shards, largest logit", max(abs(a).max() for k, a in arrays.items() if k.startswith("logits")))


def write_tokenizer() -> None:
    """A byte-level tokenizer with a template beside tiny-llama-tied, and templates.json: what transformers renders."""
    import jinja2
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=319,
        show_progress=False,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    engine.train_from_iterator([text for text in TEXTS for _ in range(4)] + list(TEMPLATES.values()), trainer)
    engine.add_tokens([AddedToken("<tool>", normalized=False)])
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATES["blocks"]
    )
    assert len(tokenizer) <= 320, len(tokenizer)
    folder = FIXTURES / "tiny-llama-tied"
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0})
    rows = []
    for name, template in TEMPLATES.items():
        for messages in CONVERSATIONS:
            for flag in (False, True):
                try:
                    text = tokenizer.apply_chat_template(
                        messages, chat_template=template, tokenize=False, add_generation_prompt=flag
                    )
                except jinja2.exceptions.TemplateError as error:
                    text = None
                    print(name, "refuses:", error)
                rows.append({"template": name, "messages": messages, "add_generation_prompt": flag, "text": text})
    texts = [text + extra for text in TEXTS for extra in ("", " <tool></s><end> ok")]
    encodings = [
        {
            "text": text,
            "ids": tokenizer.encode(text),
            "ids_bare": tokenizer.encode(text, add_special_tokens=False),
            "decoded": tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True),
        }
        for text in texts
    ]
    write_json(FIXTURES / "templates.json", {"templates": TEMPLATES, "renders": rows, "encodings": encodings})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    gguf = parser.parse_args().gguf
    for name, config in tiny_models().items():
        write_tiny(name, config)
    write_tokenizer()
    write_smollm2(gguf)


if __name__ == "__main__":
    main()
