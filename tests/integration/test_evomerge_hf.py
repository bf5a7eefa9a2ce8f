"""Phase 2 on models of another house: three tied Llamas branched from one, with a tokenizer of their own."""

from __future__ import annotations

import json

import pytest
import torch

from agent_forge.pipeline.orchestrator import PipelineOrchestrator
from agent_forge.profile import Profile
from forgekit.data.tokenizer import train_tokenizer

NAMES = ("first", "second", "third")
SKILLS = {name: [{"family": family, "levels": [1]}] for name, family in zip(NAMES, ("copy", "sort", "reverse"))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``base`` and three siblings, as transformers writes them; the embedding is the head's too."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("hf")
    words = train_tokenizer(["copy 1 2 3 sort 9 8 reverse 4 the quick brown fox " * 40], 300)
    renamed = words.to_str().replace("<|end|>", "</s>").replace("<|pad|>", "<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(renamed), eos_token="</s>")
    shape = LlamaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    for number, name in enumerate(("base", *NAMES)):
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("strategy", ["elite", "cma_es"])
def test_three_llamas_become_one_that_transformers_reads(folders, tmp_path, strategy):
    from transformers import AutoModelForCausalLM

    search = {
        "base": str(folders / "base"),
        "skills": SKILLS,
        "strategy": strategy,
        "generations": 2,
        "workers": 0,
        "text": {"names": ["python_prose"], "bytes_each": 60_000},
        "search": {"population": 8 if strategy == "elite" else 4},
        "fitness": {"problems": 4, "windows": 4, "length": 16},
        "evaluation": {"problems": 10, "windows": 4},
    }
    profile = Profile.build(
        {
            "name": "theirs",
            "threads": 1,
            "phases": {"evomerge": search},
            "handoffs": {"external->evomerge": {"param_range": "any", "num_models": 3}},
        }
    )
    models = [str(folders / name) for name in NAMES]
    with PipelineOrchestrator.starting_from(models, profile, tmp_path, start="evomerge") as forge:
        result = forge.run_full_pipeline()["evomerge"]
    champion = forge.storage.resolve(result.model)
    loaded = AutoModelForCausalLM.from_pretrained(champion)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    table = result.metrics["fitness_table"]
    assert set(table) == {"base", *NAMES, "generation 0 best", "champion"}
    assert len({row["report"]["bits_per_byte"] for row in table.values()}) >= 4, "different models were scored"
    manifest = json.loads((champion / "manifest.json").read_text())
    assert len(manifest["parents"]) == 3 and manifest["metadata"]["merge_technique"]
    assert result.artifacts["conversation"] and result.artifacts["fall_back"][0] in manifest["parents"]
