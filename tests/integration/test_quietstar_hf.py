"""Phase 3 on a model of another house: a tied Llama with a tokenizer of its own gets the thinking tokens and thinks."""

from __future__ import annotations

import json

import pytest
import torch

from agent_forge.pipeline.handoff import ModelHandoffValidator
from agent_forge.pipeline.orchestrator import PipelineOrchestrator
from agent_forge.profile import Profile
from forgekit.data.batches import asked
from forgekit.data.tokenizer import THINKING
from forgekit.errors import ConfigError
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.io import read_model
from forgekit.tracking.events import read_events

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "add 1 2 3 track + - = 9 8 copy 4 the quick brown fox as then because not but think answer all " * 40
TRAIN = {"steps": 2, "rows": 4, "seq_len": 48, "log_every": 1, "optimizer": {"lr": 0.01, "fallback_lr": 0.01}}
SETTINGS = {
    "skills": [{"family": "copy", "levels": [1]}],
    "traces": {"mix": [{"family": "add", "levels": [2]}, {"family": "state", "levels": [2]}], "per_level": 900},
    "teach": {"train": TRAIN, "pool": 20},
    "quiet": {
        "train": {**TRAIN, "rows": 2},
        "talk": {"thoughts": 2, "ahead": 2, "points": {"most": 1, "min_length": 2, "max_length": 4}},
        "validations": 1,
        "watched": 2,
        "rows": 4,
    },
    "text": {"names": ["python_prose"], "bytes_each": 60_000},
    "theater": {"thinking_budget": 6},
    "evaluation": {"problems": 10, "skills": 10, "select": 4, "windows": 4, "length": 16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama as transformers writes it: no thinking tokens, no chat template, the embedding is the head's too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name in ("<unk>", "</s>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    words.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<unk>")
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf") / "llama"
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def profile(**changes) -> Profile:
    values = {"name": "theirs", "threads": 1, "context": 160, "phases": {"quietstar": {**SETTINGS, **changes}}}
    return Profile.build({**values, "handoffs": {"external->quietstar": {"param_range": "any"}}})


def test_a_llama_learns_the_thinking_tokens_and_thinks(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    with PipelineOrchestrator.starting_from([str(folder)], profile(), tmp_path, start="quietstar") as forge:
        result = forge.run_full_pipeline()["quietstar"]
    thinker = forge.storage.resolve(result.model)
    (parent, parents_tokenizer), (model, tokenizer) = read_model(folder), read_model(thinker)
    assert all(parents_tokenizer.token_to_id(name) is None for name in THINKING)
    ids = {name: tokenizer.token_to_id(name) for name in THINKING}
    assert len(set(ids.values())) == 8 and model.config.vocab_size == parent.config.vocab_size + 8 > max(ids.values())
    assert tokenizer.encode("".join(THINKING), add_special_tokens=False).ids == list(ids.values()), "one token each"
    loaded = AutoModelForCausalLM.from_pretrained(thinker)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert loaded.config.vocab_size == model.config.vocab_size
    prompt = asked(tokenizer, "add 12 30")
    (said,) = Engine(model, tokenizer).generate([prompt], SamplingConfig(max_tokens=8, thinking="on"))
    assert said.thinking_tokens and not any(name in said.text for name in THINKING)
    metadata = json.loads((thinker / "manifest.json").read_text(encoding="utf-8"))["metadata"]
    assert metadata["vocabulary_added"] == 8 and metadata["thinks"]
    notes = " ".join(event["data"]["note"] for event in read_events(forge.folder / "events.jsonl", kind="data"))
    assert "added <think>" in notes and "no chat format" in notes
    validator = ModelHandoffValidator(forge.profile)
    decision = validator.validate_stored("quietstar", "bitnet", forge.storage, [result.model])
    assert {refusal.kind for refusal in decision.refusals} <= {"threshold"}, decision.message


def test_what_it_can_do_must_be_said(folder, tmp_path):
    with PipelineOrchestrator.starting_from([str(folder)], profile(skills=None), tmp_path, start="quietstar") as forge:
        with pytest.raises(ConfigError, match="phases.quietstar.skills: nobody knows what the model can do; name it"):
            forge.run_full_pipeline()
