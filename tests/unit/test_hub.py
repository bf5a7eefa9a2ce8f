"""The bridge: our folders open in transformers, transformers' models follow our protocol, nothing is loaded early."""

import copy
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from forgekit.data.tokenizer import question, train_tokenizer
from forgekit.errors import ArtifactError, ForgeError
from forgekit.hub import HFTokenizer, first_line, read_hf_tokenizer
from forgekit.infer.chat import Chat, conversation_ids
from forgekit.infer.engine import Engine, Session
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.base import CausalLM, score_at
from forgekit.models.config import GPTConfig, TRMTitansConfig
from forgekit.models.constants import IGNORE
from forgekit.models.io import build_model, parameter_count, read_model, write_model
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.model import packed

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü 😀 €. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
TINY = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 2, "ffn_hidden": 16, "max_seq_len": 32}
OURS = {
    "gpt": GPTConfig(**TINY, emb_rank=8),
    "trm_titans": TRMTitansConfig(**TINY, d_mem=8, memory_chunk=3, gate_hidden=4, trm_hidden=8, window=4, t_max=2),
}
GREEDY = SamplingConfig(max_tokens=12)
PROMPTS = ["hello", "this is some text", "1"]


pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(model):
    """Zero-initialised weights hide mistakes: move everything."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module", params=sorted(OURS))
def ours(request, tmp_path_factory):
    """A folder of one of our families."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    write_model(noisy(build_model(OURS[request.param])), TOKENIZER, folder)
    return folder


# ---- ours, opened by transformers


def test_importing_forgekit_loads_neither_torch_nor_transformers():
    code = "import sys, forgekit; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert python(code) == "False False"


@pytest.mark.parametrize(
    "imports",
    [
        "import forgekit, transformers.modeling_utils, transformers",
        "from transformers import AutoConfig, AutoModelForCausalLM; import forgekit",
    ],
)
def test_transformers_opens_our_folder_whoever_is_imported_first(imports, tmp_path):
    write_model(build_model(OURS["gpt"]), TOKENIZER, tmp_path)
    code = f"""{imports}
import importlib, importlib.util, sys
name = "transformers.models.auto.configuration_auto"
importlib.util.find_spec(name)  # looking for it is not importing it
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
kind = AutoConfig.from_pretrained({str(tmp_path)!r}).model_type
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
importlib.reload(forgekit.hub).install_hook()
left = [f for f in sys.meta_path if type(f).__name__ == "_Hook"]
module = sys.modules[name]
print(kind, type(model).__name__, len(AutoTokenizer.from_pretrained({str(tmp_path)!r})), len(left))
assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
"""
    assert python(code) == f"gpt ForgeForCausalLM {V} 0"


def test_a_second_hook_replaces_the_first():
    code = """import sys, forgekit, forgekit.hub
del sys.modules["forgekit.hub"]
import forgekit.hub as again
again.install_hook()
again.install_hook()
hooks = [f for f in sys.meta_path if type(f).__name__ == "_Hook"]
print([type(f) is again._Hook for f in hooks])
"""
    assert python(code) == "[True]"


@pytest.fixture(scope="module")
def opened(ours):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(info.values()), info
    return model, AutoTokenizer.from_pretrained(ours, padding_side="left")


def test_logits_are_ours_on_either_side_of_padding(ours, opened):
    theirs, fast = opened
    model, _ = read_model(ours)
    assert parameter_count(theirs) == parameter_count(model)
    assert theirs.get_input_embeddings().weight is theirs.core.embedding.table.weight
    for side in ("left", "right"):
        batch = fast(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
        with torch.inference_mode():
            logits = theirs(**batch).logits
            cached = theirs(**batch, use_cache=True).logits
            for b, prompt in enumerate(PROMPTS):
                want = model(torch.tensor([TOKENIZER.encode(prompt).ids])).logits[0]
                real = batch["attention_mask"][b].bool()
                torch.testing.assert_close(logits[b][real], want, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(cached[b][real], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_our_engine(ours, opened, use_cache):
    theirs, fast = opened
    want = Engine(*read_model(ours)).generate(PROMPTS, GREEDY)
    batch = fast(PROMPTS, return_tensors="pt", padding=True)
    out = theirs.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=use_cache)
    for row, result in zip(out[:, batch["input_ids"].shape[1] :].tolist(), want):
        assert row == result.tokens + [0] * (12 - len(result.tokens))


def test_beam_search_with_our_state_as_cache_equals_without(opened):
    model, fast = opened
    batch = fast(PROMPTS, return_tensors="pt", padding=True)
    with_cache, without = (
        model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(with_cache, without)
    cache = model(**batch, use_cache=True).past_key_values
    assert cache.get_seq_length() == batch["input_ids"].shape[1] and not cache.is_compileable and not cache.is_croppable
    cache.batch_repeat_interleave(2)
    assert cache.state.position_B.tolist() == batch["attention_mask"].sum(1).repeat_interleave(2).tolist()


def test_labels_give_the_shifted_loss_and_training_mode_the_familys_own(ours, opened):
    theirs, fast = opened
    model, _ = read_model(ours)
    losses = []
    for side in ("right", "left"):
        batch = fast(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
        # Labels under padding must not count, even where the caller forgot to mask them.
        out = theirs(**batch, labels=batch["input_ids"])
        losses.append(out.loss)
        if side == "right":
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
            want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(*losses)
    row = torch.tensor([TOKENIZER.encode(PROMPTS[1]).ids])
    theirs.train()
    loss = theirs(row, labels=row).loss
    loss.backward()
    theirs.eval()
    torch.testing.assert_close(loss, model.train().training_loss(row[:, :-1], row[:, 1:]).total)
    assert all(p.grad is not None for n, p in theirs.named_parameters())
    theirs.zero_grad()


def test_saving_gives_back_our_folder(ours, opened, tmp_path):
    theirs, fast = opened
    theirs.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    model, tokenizer = read_model(ours)
    again, tokenizer_again = read_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert tokenizer_again.encode("hello 123").ids == tokenizer.encode("hello 123").ids
    assert fast.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True) == (
        question("x")
    )


def test_unstored_buffers_are_not_left_to_chance(ours, monkeypatch):
    from transformers import AutoModelForCausalLM

    honest = torch.empty_like
    # What uninitialised memory may hold.
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: honest(*a, **k).fill_(7))
    model = AutoModelForCausalLM.from_pretrained(ours)
    buffers = [buffer for _, buffer in model.named_non_persistent_buffers()]
    assert buffers and not any(buffer.any() for buffer in buffers)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_a_tensor_too_few_or_too_many_is_refused(ours, tmp_path, change):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(ours, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        tensors.pop("norm.weight")
    else:
        tensors["extra"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="norm.weight" if change == "missing" else "extra"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_is_told_why_it_cannot_open_a_packed_folder(ours, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_model(packed(read_model(ours)[0], TernaryPlan(), GroupPlan()), TOKENIZER, tmp_path)
    with pytest.raises(ArtifactError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: its weights are packed") and "read_model" in caught.value.remedy
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == V, "its tokenizer is one like any other"


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("lm_eval") and find_spec("accelerate")), reason="lm-eval[hf] is not installed")
def test_lm_eval_scores_our_folder_as_we_do(tmp_path):
    torch.manual_seed(0)
    model = noisy(build_model(OURS["trm_titans"]))
    write_model(model, TOKENIZER, tmp_path)

    def score(text, choice):
        ids, start = TOKENIZER.encode(text + choice).ids, len(TOKENIZER.encode(text).ids)
        logp = scored(model, ids).log_softmax(-1)
        return sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))

    choices = [" world", " digits"]
    texts = ["hello", "this is", "some text with", "text", "digits", "and", "hello world, this"]
    best = [max((0, 1), key=lambda c, t=text: score(t, choices[c])) for text in texts]
    assert len(set(best)) == 2, "choose another seed: one choice always wins"
    rows = [{"text": text, "choices": choices, "answer": answer} for text, answer in zip(texts, best)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    code = f"""import forgekit, lm_eval
out = lm_eval.simple_evaluate(model="hf", model_args="pretrained={tmp_path},device=cpu", tasks=[{task!r}])
print(out["results"]["tiny"]["acc,none"])
"""
    assert float(python(code)) == 1.0


# ---- theirs, opened by us


def llama():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        eos_token_id=[1, 5],
        pad_token_id=0,
        bos_token_id=None,
    )


def qwen():
    """Tied, with a sliding window in its second layer: padding inside the window must not count."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )


@pytest.fixture(scope="module", params=[llama, qwen], ids=["llama", "qwen"])
def theirs(request, tmp_path_factory):
    """A Hugging Face folder of a tiny random model with a tokenizer."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    model = AutoModelForCausalLM.from_config(request.param())
    noisy(model).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>", pad_token="<|pad|>")
    if request.param is qwen:
        fast.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(theirs):
    return read_model(theirs)


def test_scores_of_a_wrapped_model_at_some_positions_are_those_of_a_full_pass(loaded):
    model, at = loaded[0], torch.tensor([0, 6, 7, 13])
    ids = torch.randint(2, V, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        part, full = score_at(model, ids, at), model(ids).logits.flatten(0, 1)
    assert part.steps is None and part.logits.shape == (4, V)
    torch.testing.assert_close(part.logits, full[at])


def test_a_wrapped_model_follows_the_protocol(loaded):
    model, tokenizer = loaded
    assert isinstance(model, CausalLM) and isinstance(tokenizer, HFTokenizer)
    assert (model.config.family, model.config.vocab_size, model.config.d_model) == ("hf", V, 32)
    assert model.attentions() == [] and not model.training
    assert model.context_limit == model.config.max_seq_len
    assert copy.copy(tokenizer).encode("hello").ids == tokenizer.encode("hello").ids
    table, total = V * 32, parameter_count(model)
    met = total if model.hf.config.tie_word_embeddings else total - table
    assert model.flops_per_token(10) == 2 * met + 4 * 2 * 32 * 10


def rows_of(*lengths, seed=1):
    torch.manual_seed(seed)
    return [torch.randint(6, V, (n,)).tolist() for n in lengths]


def scored(model, row):
    return model(torch.tensor([row])).logits[0]


def pad(rows, width):
    return torch.tensor([(row + [0] * width)[:width] for row in rows])


def test_cached_and_ragged_equal_uncached(loaded):
    model, _ = loaded
    rows, lengths = rows_of(16, 13, 9), [11, 8, 2]
    with torch.inference_mode():
        want = [scored(model, row) for row in rows]
        out = model(pad([r[:n] for r, n in zip(rows, lengths)], 11), model.initial_state(3), torch.tensor(lengths))
        for b, n in enumerate(lengths):
            torch.testing.assert_close(out.logits[b, :n], want[b][:n], rtol=1e-4, atol=1e-4)
        kept, start = [0, 2], out.state
        state = start.rows(torch.tensor(kept))
        for step in range(5):
            token = torch.tensor([[rows[b][lengths[b] + step]] for b in kept])
            out = model(token, state)
            state = out.state
            for i, b in enumerate(kept):
                torch.testing.assert_close(out.logits[i, 0], want[b][lengths[b] + step], rtol=1e-4, atol=1e-4)
        # A state is a value: none of this has changed the first one.
        token = torch.tensor([[row[n]] for row, n in zip(rows, lengths)])
        for _ in range(2):
            out = model(token, start)
            for b, n in enumerate(lengths):
                torch.testing.assert_close(out.logits[b, 0], want[b][n], rtol=1e-4, atol=1e-4)


def test_rows_may_go_on_by_different_lengths(loaded):
    model, _ = loaded
    rows, first, more = rows_of(14, 13, 9), [7, 8, 2], [5, 2, 0]
    with torch.inference_mode():
        want = [scored(model, row) for row in rows]
        out = model(pad([r[:n] for r, n in zip(rows, first)], 8), model.initial_state(3), torch.tensor(first))
        out = model(pad([r[n : n + k] for r, n, k in zip(rows, first, more)], 5), out.state, torch.tensor(more))
        done = [n + k for n, k in zip(first, more)]
        for b, n in enumerate(first):
            torch.testing.assert_close(out.logits[b, : more[b]], want[b][n : done[b]], rtol=1e-4, atol=1e-4)
        out = model(torch.tensor([[row[n]] for row, n in zip(rows, done)]), out.state)
        for b, n in enumerate(done):
            torch.testing.assert_close(out.logits[b, 0], want[b][n], rtol=1e-4, atol=1e-4)


def test_training_loss_equals_transformers_own(loaded):
    model, _ = loaded
    rows = pad(rows_of(12, 7), 12)
    labels = rows.masked_fill(rows == 0, IGNORE)
    loss = model.training_loss(rows[:, :-1], labels[:, 1:])
    torch.testing.assert_close(loss.total, model.hf(input_ids=rows, labels=labels).loss)
    assert loss.tokens == int((labels[:, 1:] != IGNORE).sum()) and not loss.nats.requires_grad


def test_the_engine_drives_a_wrapped_model(loaded, theirs):
    engine = Engine(*loaded)
    assert engine.end_ids == ({1, 5} if "llama" in theirs.name else {1})
    together = engine.generate(PROMPTS, GREEDY)
    for prompt, result in zip(PROMPTS, together):
        assert engine.generate([prompt], GREEDY) == [result]
        assert "".join(engine.stream(prompt, GREEDY)) == result.text
        ids = torch.tensor([TOKENIZER.encode(prompt).ids])
        own = loaded[0].hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert own[0, ids.shape[1] :].tolist() == result.tokens
        assert result.mean_steps is None
    session, conversation = Session(engine), [40, 41]
    for _ in range(2):
        list(session.stream(conversation, SamplingConfig(max_tokens=4)))
        assert session.last == engine.generate([conversation], SamplingConfig(max_tokens=4))[0]
        conversation = conversation + session.last.tokens + [50, 51]


def test_the_context_ends_a_wrapped_models_text(loaded):
    engine = Engine(*loaded)
    engine.end_ids, limit = frozenset(), engine.context_limit
    (result,) = engine.generate([[40] * (limit - 3)], SamplingConfig(max_tokens=50))
    assert result.finish_reason == "context" and len(result.tokens) == 3
    with pytest.raises(ForgeError, match=f"{limit + 1} tokens, the model's context is {limit}"):
        engine.generate([[40] * (limit + 1)])


def test_chat_uses_the_models_template_or_plain_text(loaded, theirs):
    _, tokenizer = loaded
    messages = [{"role": "user", "content": "hello"}]
    if "qwen" in theirs.name:
        assert tokenizer.decode(conversation_ids(tokenizer, messages)) == "[user]hello[assistant]"
    else:
        assert tokenizer.chat_text(messages) is None
    chat = Chat(Engine(*loaded), SamplingConfig(max_tokens=3))
    list(chat.say("a"))
    list(chat.say("b"))
    assert chat.remember and len(chat.messages) == 4
    assert chat.session.prefilled < len(conversation_ids(tokenizer, chat.messages[:3]))


def test_a_wrapped_model_writes_itself_and_its_tokenizer(loaded, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = loaded
    write_model(model, tokenizer, tmp_path)
    again, tokenizer_again = read_model(tmp_path)
    row = torch.tensor(rows_of(6))
    with torch.inference_mode():
        assert torch.equal(again(row).logits, model(row).logits)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(row).logits, model(row).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.fast.chat_template
    assert tokenizer_again.encode_batch(["hello"])[0].ids == tokenizer.encode("hello").ids


def test_the_first_line_of_a_message_is_told_with_what_it_announces():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("why:\n  two   spaces\nthree")) == "why: two spaces"
    assert first_line(ValueError("why:")) == "why:" and first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 500))) == 200


def test_values_that_transformers_refuses_are_told_in_one_line(tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(llama()).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_size": 33}))
    with pytest.raises(ArtifactError, match=r"33\) is not a multiple of the number of attention heads \(4") as caught:
        read_model(tmp_path)  # an error of huggingface_hub that is no ValueError
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_broken_folders_are_refused_in_one_line(theirs, tmp_path):
    def broken(name, change):
        folder = shutil.copytree(theirs, tmp_path / name)
        change(folder)
        with pytest.raises(ArtifactError) as caught:
            read_model(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    def drop_tensor(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors.pop("model.norm.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def rename(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "model_type": "no_such_model"}))

    broken("no-weights", lambda f: (f / "model.safetensors").unlink())
    broken("cut", lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:500]))
    assert "model.norm.weight" in broken("tensor", drop_tensor)
    assert "no_such_model" in broken("type", rename)
    assert "is no JSON object" in broken("list", lambda f: (f / "config.json").write_text("[]"))
    assert "tokenizer" in broken("tokenizer", lambda f: [p.unlink() for p in f.glob("tokenizer*")])
    assert "tokenizer" in broken("cut-tokenizer", lambda f: (f / "tokenizer.json").write_text("{"))
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        read_hf_tokenizer(tmp_path / "nowhere")
