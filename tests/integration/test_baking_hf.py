"""Baking into Hugging Face models, their chat templates, and the command line."""

from __future__ import annotations

import json

import pytest
import torch

from agent_forge.prompt_baking import PromptBakingConfig, bake_prompt
from agent_forge.prompt_baking.adapters import linear_maps
from agent_forge.prompt_baking.sides import sides_of
from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.io import read_model
from forgekit.store.artifact import MANIFEST

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
PROMPT = "digits text 123 digits text 123"
CONTEXTS = [f"{word} {number}" for word in ("hello", "text", "digits") for number in range(8)]
QUICK = {"max_tokens": 6, "trajectories": 64, "held_out": 12, "rows": 16, "num_epochs": 6, "learning_rate": 0.01}
QUICK |= {"rank": 4, "alpha": 4, "device": "cpu", "micro_batch": 16}

TAIL = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}[assistant]"
PLAIN = TAIL
# As Qwen2.5: a default where no system message is given.
DEFAULT = "{% if messages[0]['role'] != 'system' %}[system]You are Q, made by a shop.<|end|>{% endif %}" + TAIL
# An empty system message counts as none.
STUBBORN = (
    "{% if messages[0]['role'] != 'system' or not messages[0]['content'] %}[system]You are Q.<|end|>{% endif %}" + TAIL
)
# As Llama 3.1: a line of its own on both sides.
DATED = "[system]Cutting Knowledge Date: 2023<|end|>" + TAIL
# As Gemma: no system role.
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TAIL
# Passes over what is no user or assistant.
DEAF = TAIL.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
# No special tokens at all, as Vicuna.
WORDY = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}A chat with a polite assistant."
    "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %} USER: {{ m['content'] }}{% endif %}{% endfor %} AI:"
)


def config_of(kind: str):
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    if kind == "gpt2":
        return GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=96, resid_pdrop=0.5, **ends)
    values = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, **ends}
    return LlamaConfig(**values) if kind == "llama" else Qwen2Config(**values, tie_word_embeddings=True)


def folder_of(path, kind="llama", template=PLAIN, dtype=torch.float32):
    """A Hugging Face folder of a tiny random model."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.to(dtype).save_pretrained(path)
    fast = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = template
    fast.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_a_prompt_is_baked_into_any_causal_model(tmp_path, kind):
    folder = folder_of(tmp_path / kind, kind)
    model, tokenizer = read_model(folder)
    names = linear_maps(model)
    assert names and not [n for n in names if "lm_head" in n or "wte" in n or "embed" in n]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = PromptBakingConfig.build(QUICK)
    baked = bake_prompt(model, PROMPT, config, tokenizer=tokenizer, contexts=CONTEXTS)
    assert baked.divergence_before > 0.01 and baked.divergence_after < 0.85 * baked.divergence_before
    after = baked.model.state_dict()
    assert after.keys() == before.keys() and all(after[n].dtype == t.dtype for n, t in before.items())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    changed = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert changed == {f"{name}.weight" for name in names}
    # Dropout would make two equal sides differ, and no two runs alike.
    again = bake_prompt(model, PROMPT, config, tokenizer=tokenizer, contexts=CONTEXTS)
    assert again.losses == baked.losses


def test_half_precision_weights_stay_half_precision(tmp_path):
    model, tokenizer = read_model(folder_of(tmp_path / "half", dtype=torch.bfloat16))
    config = PromptBakingConfig.build(QUICK)
    baked = bake_prompt(model, PROMPT, config, tokenizer=tokenizer, contexts=CONTEXTS)
    assert {p.dtype for p in baked.model.parameters()} == {torch.bfloat16}
    assert baked.divergence_after < baked.divergence_before


def test_a_template_without_a_default_is_taken_as_it_is(tmp_path):
    for name, template in (("plain", PLAIN), ("dated", DATED)):
        sides = sides_of(*read_model(folder_of(tmp_path / name, template=template)))
        assert sides.system and not sides.empty and sides.notes == ()


@pytest.mark.parametrize("template", [DEFAULT, WORDY], ids=["default", "wordy"])
def test_a_default_system_prompt_is_told_and_left_out(tmp_path, template):
    injected = "You are Q, made by a shop." if template is DEFAULT else "A chat with a polite assistant."
    model, tokenizer = read_model(folder_of(tmp_path / "m", template=template))
    assert injected in tokenizer.chat_text([{"role": "user", "content": "hello"}])
    sides = sides_of(model, tokenizer)
    assert sides.empty and len(sides.notes) == 1 and injected in sides.notes[0]
    bare, told = (tokenizer.decode(sides.ids("hello", p), skip_special_tokens=False) for p in ("", PROMPT))
    assert injected not in bare and injected not in told and PROMPT in told
    quick = PromptBakingConfig.build({**QUICK, "num_epochs": 1})
    baked = bake_prompt(model, PROMPT, quick, tokenizer=tokenizer, contexts=CONTEXTS)
    assert injected in baked.notes[0]
    shown = tokenizer.decode(list(baked.held[0].trajectories[0].bare), skip_special_tokens=False)
    assert injected not in shown


def test_a_default_that_cannot_be_left_out_is_refused(tmp_path):
    model, tokenizer = read_model(folder_of(tmp_path / "m", template=STUBBORN))
    with pytest.raises(ArtifactError, match=r"chat_template: .*You are Q\..*take that default out"):
        sides_of(model, tokenizer)


@pytest.mark.parametrize("template", [STRICT, DEAF], ids=["strict", "deaf"])
def test_without_a_system_role_the_prompt_stands_in_the_question(tmp_path, template):
    model, tokenizer = read_model(folder_of(tmp_path / "m", template=template))
    sides = sides_of(model, tokenizer)
    assert "takes no system message" in sides.notes[0]
    told = tokenizer.decode(sides.ids("hello", PROMPT), skip_special_tokens=False)
    assert told == f"[user]{PROMPT}\n\nhello<|end|>[assistant]"
    assert tokenizer.decode(sides.ids("hello"), skip_special_tokens=False) == "[user]hello<|end|>[assistant]"


def test_a_model_without_a_chat_format_reads_plain_text(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bare.train_from_iterator(["hello world"] * 5, trainer)
    folder = folder_of(tmp_path / "m")
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(folder)
    for file in ("chat_template.jinja",):
        (folder / file).unlink(missing_ok=True)
    sides = sides_of(*read_model(folder))
    assert "no chat format" in sides.notes[0]
    assert bare.decode(sides.ids("hello", "be brief")) == "be brief\n\nhello\n\n"
    assert bare.decode(sides.ids("hello")) == "hello\n\n"


# ---- the command line


def settings() -> list[str]:
    return [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def ready(tmp_path):
    folder_of(tmp_path / "model", template=DEFAULT)
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n")
    (tmp_path / "contexts.txt").write_text("\n".join(CONTEXTS))
    return ["bake", "model", "--prompt-file", "prompt.txt", "--contexts", "contexts.txt", "--problems", "0"]


def test_the_command_bakes_a_hugging_face_folder(forge, ready, tmp_path):
    done = forge(*ready, *settings(), "--json")
    assert done.code == 0, done.err
    receipt = json.loads(done.out)
    assert receipt["output"] == "model-baked" and "made by a shop" in receipt["notes"][0]
    folder = tmp_path / "model-baked"
    assert not (folder / MANIFEST).exists(), "a folder without lineage stays one"
    assert {e["claim"] for e in json.loads((folder / "evidence.json").read_text())}
    card = (folder / "README.md").read_text()
    assert PROMPT in card and "made by a shop" in card
    model, tokenizer = read_model(folder)
    assert tokenizer.fast.chat_template == DEFAULT
    (answer,) = Engine(model, tokenizer).generate(["hello"], SamplingConfig(max_tokens=3))
    assert answer.tokens
    assert forge(*ready, *settings()).error.startswith("model-baked: exists already")


def test_the_command_shows_what_changed_and_takes_several_prompts(forge, ready, tmp_path):
    (tmp_path / "second.txt").write_text("in digits")
    done = forge(*ready, "--prompt-file", "second.txt", "--out", "two", "--strength", "0.3", *settings())
    assert done.code == 0, done.err
    assert "nats per token" in done.out and "in digits" in done.out and "r2" in done.err
    assert "wrote two" in done.err and (tmp_path / "two" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", "0"], "bake: strength: value 0.0 refused"),
        (["--strength", "1.2"], "bake: strength: value 1.2 refused"),
        (["--mode", "quarter"], "bake: mode: value 'quarter' refused"),
        (["--set", "num_epoch=3"], "bake: num_epoch: unknown key; did you mean num_epochs"),
        (["--set", "optimizer.lrr=3"], "bake: optimizer.lrr: unknown key"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: cannot be read"),
        (["--prompt-file", "empty.txt"], "--prompt-file empty.txt: is empty"),
        (["--contexts", "empty.txt"], "--contexts empty.txt: is empty"),
        (["--prompt-file", "long.txt"], "prompt: "),
        (["--prompt-file", "prompt.txt", "--mode", "full"], "prompt: 2 prompts in mode full"),
    ],
)
def test_the_command_refuses_in_one_line(forge, ready, tmp_path, words, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("digits " * 200)
    done = forge(*ready, *words)
    assert done.code != 0 and done.error.startswith(message) and not (tmp_path / "model-baked").exists()
