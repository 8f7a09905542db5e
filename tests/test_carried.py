"""Files and ids of special tokens travel with a model beside its weights."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from sentencepiece import SentencePieceTrainer

from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.hf_files import carried, has_tokenizer, read_files
from megatron_ext.convert.special_tokens import KINDS, ids_in, special_ids
from megatron_ext.runtime.errors import CHECKPOINT, DATA, USAGE
from tests.models import LLAMA
from tests.programs import fail, run_here, succeed, write_corpus, write_model

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(90)), "<pad>"]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "w7", "pad_token": "<pad>"}
IDS = {"bos_token_id": 1, "eos_token_id": 10, "pad_token_id": 93}

TRAVELS = ["tokenizer.json", "tekken.json", "additional_chat_templates/tool_use.jinja", "LICENSE"]
TRAVELS += ["chat_template.jinja", "preprocessor_config.json", "new_kind_of_file.txt"]
STAYS = {
    "modeling_x.py": "code",
    "README.md": "card of the model before",
    "pytorch_model.bin": "weights",
    "original/consolidated.00.pth": "weights",
    "link.json": "a link out of the folder",
}
READ = ["config.json", "model.safetensors", "model.safetensors.index.json", ".gitattributes"]


def write_words(folder):
    """A tokenizer of ``WORDS`` as transformers saves it."""
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(
        folder
    )


def test_what_is_no_weights_config_or_code_travels(tmp_path, capsys):
    folder, outside = tmp_path / "hf", tmp_path / "secret.json"
    outside.write_text("{}")
    for name in [*TRAVELS, *STAYS, *READ, "original/params.json"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "link.json":
            (folder / name).symlink_to(outside)
        else:
            (folder / name).write_text(name)
    assert read_files(folder) == {name: name.encode() for name in TRAVELS}
    line = capsys.readouterr().err
    for name, reason in STAYS.items():
        assert f"{Path(name).parts[0]} ({reason})" in line
    assert not any(name in line for name in READ)


def test_files_of_the_hubs_cache_are_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    assert carried(snapshot) == (["tokenizer.json"], [])
    assert has_tokenizer(["tekken.json"])
    assert not has_tokenizer(["LICENSE", "generation_config.json"])


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer.model"])
def test_a_tokenizer_that_is_a_link_out_of_its_folder_is_refused(name, tmp_path):
    """Regression: whatever the link led to was copied beside every checkpoint."""
    secret, hf, model = tmp_path / "secret", tmp_path / "hf", tmp_path / "model"
    secret.write_text("{}")
    write_model(str(model), LLAMA)
    export = ["export", "--load", str(model), "--hf", str(hf), "--model-type", "mistral"]
    succeed("tools.convert", export)
    (hf / name).symlink_to(secret)
    save = tmp_path / "save"
    code, line = fail("tools.convert", ["import", "--hf", str(hf), "--save", str(save)])
    assert code == CHECKPOINT
    assert f"{hf / name} is a link out of its folder, to {secret}" in line
    typed = ["--tokenizer-model", str(hf)]
    export[4] = str(tmp_path / "again")
    assert fail("tools.convert", [*export, *typed])[0] == CHECKPOINT
    # And of a checkpoint, by whoever makes another one from it.
    beside = model / "release/tokenizer"
    beside.mkdir()
    (beside / name).symlink_to(secret)
    argv = f"--load {model} --target-ffn-hidden-size 48 --importance random --seq-length 8"
    code, line = fail("prune", [*argv.split(), "--micro-batch-size", "1", "--save", str(save)])
    assert code == CHECKPOINT
    assert f"{beside / name} is a link out of its folder, to {secret}" in line
    assert not list(tmp_path.rglob(f"{save.name}*"))


def test_ids_of_every_kind_of_tokenizer(tmp_path):
    write_words(tmp_path)
    files = read_files(tmp_path)
    assert ids_in(files) == IDS
    config = json.loads(files["tokenizer_config.json"])
    assert ids_in({**files, "tokenizer_config.json": b"{"}).keys() <= IDS.keys()
    decoder = {str(WORDS.index(word)): {"content": word} for word in SPECIAL.values()}
    old = {**config, **SPECIAL, "added_tokens_decoder": decoder}
    assert ids_in({"tokenizer_config.json": json.dumps(old).encode()}) == IDS
    table = {f"{name}": {"content": word} for name, word in SPECIAL.items()}
    vocabulary = json.dumps({word: n for n, word in enumerate(WORDS)}).encode()
    bpe = {"special_tokens_map.json": json.dumps(table).encode(), "vocab.json": vocabulary}
    assert ids_in(bpe) == IDS
    lines = {"tokenizer_config.json": json.dumps(SPECIAL).encode()}
    assert ids_in({**lines, "vocab.txt": "\n".join(WORDS).encode()}) == IDS
    text = tmp_path / "text"
    text.write_text("abc bcd cde def efa fab\n" * 20)
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=12, eos_id=2, bos_id=-1
    )
    assert ids_in({"tokenizer.model": (tmp_path / "m.model").read_bytes()}) == {"eos_token_id": 2}
    assert ids_in({"tokenizer.model": b"no such"}) == {}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ids_come_from_the_origin(model_type):
    """As transformers reads it, where a key is left out too; an id needs a row."""
    config = transformers.AutoConfig.for_model(model_type)
    own = {f"{kind}_token_id": getattr(config, f"{kind}_token_id") for kind in KINDS}
    assert special_ids({"model_type": model_type}, {}, 10**6) == own
    said = {"model_type": model_type, "eos_token_id": [3, 4]}
    assert special_ids(said, {}, 10**6) == own | {"eos_token_id": [3, 4]}
    assert special_ids({"model_type": model_type}, {}, 0) == dict.fromkeys(own)
    assert special_ids({}, {"tokenizer.json": b"{}"}, 0) == dict.fromkeys(own)


def test_generate_stops_at_a_models_own_end(tmp_path):
    """A model that was trained here, exported with its tokenizer and without one."""
    megatron, words = tmp_path / "model", tmp_path / "words"
    write_model(str(megatron), LLAMA)
    write_words(words)
    flags = ["export", "--load", str(megatron), "--model-type", "mistral", "--hf"]
    succeed("tools.convert", [*flags, str(tmp_path / "with"), "--tokenizer-model", str(words)])
    (outcome,) = succeed("tools.convert", [*flags, str(tmp_path / "without")])
    assert "no end-of-text token is known" in outcome.stderr
    for name, expected in (("with", IDS), ("without", dict.fromkeys(IDS))):
        config = transformers.AutoConfig.from_pretrained(tmp_path / name)
        generation = transformers.GenerationConfig.from_pretrained(tmp_path / name)
        for key, value in expected.items():
            assert getattr(config, key) == getattr(generation, key) == value
        said = json.loads((tmp_path / name / "config.json").read_text())
        assert said["transformers_version"] == "5.0.0"
        assert said["eos_token_id"] == expected["eos_token_id"]


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path):
    """Llama 2 with a <pad>: its own tokenizer is the checkpoint's, in every program; its data not.

    transformers#24899.
    """
    hf, teacher, pruned, student = (str(tmp_path / n) for n in ("hf", "teacher", "pruned", "out"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(vocab_size=len(WORDS) - 1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(hf)
    write_words(hf)
    (outcome,) = succeed("tools.convert", ["import", "--hf", hf, "--save", teacher])
    assert "the tokenizer 1 tokens more, without a row: <pad>" in outcome.stderr
    own = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", hf]
    few, many = (write_corpus(tmp_path / str(n), n) for n in (len(WORDS) - 1, len(WORDS)))
    shape = ["--seq-length", "8", "--micro-batch-size", "1", "--num-workers", "0"]
    cut = ["--load", teacher, "--target-ffn-hidden-size", "16", "--calibration-samples", "4"]
    train = ["--load", pruned, "--teacher-load", teacher, "--train-iters", "1", "--lr", "1e-3"]
    train += ["--global-batch-size", "1", "--eval-iters", "0", "--save-interval", "1"]
    for program, flags in (
        ("prune", [*cut, "--save", pruned, *shape, "--split", "1"]),
        ("pretrain_distill", [*train, "--save", student, *shape, "--split", "1"]),
        ("tools.evaluate", ["--load", student, "--teacher-load", teacher, *shape]),
    ):
        code, line = fail(program, [*flags, "--data-path", many])
        assert code == DATA
        assert f"the model has {len(WORDS) - 1} tokens" in line
        if program in ("prune", "pretrain_distill"):
            dry = [*flags, "--data-path", few, "--dry-run", "--gpu", "A100"]
            code, out, errors = run_here([f"{program}.py", *dry])
            assert (code, "not checked" in out) == (0, False), errors
        for typed in ((), own):
            if program == "tools.evaluate" or not typed:
                succeed(program, [*flags, *typed, "--data-path", few])
    # One command for every tokenizer: none typed is the checkpoint's.
    succeed("tools.generate", ["--load", student, "--prompt", "w1", "--max-new-tokens", "2"])
    shutil.rmtree(f"{teacher}/release/tokenizer")
    code, line = fail("tools.generate", ["--load", teacher, "--prompt", "w1"])
    assert (code, "there is no tokenizer beside the checkpoint" in line) == (USAGE, True)
    out = tmp_path / "exported"
    succeed("tools.convert", ["export", "--load", student, "--hf", str(out)])
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 93
