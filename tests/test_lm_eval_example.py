"""The tasks of the example: one right answer each; lm_eval reads them where it is there."""

import json

import pytest
import tokenizers
import transformers

from tests.programs import succeed

TEXT = "".join(
    f"def function_{i}(argument):\n    return argument * {i} + 1000000\n\n" for i in range(60)
)


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    where = ["--corpus", str(tmp_path), "--output", str(tmp_path / "tasks")]
    succeed("examples.lm_eval.tasks", [*where, "--samples", "8"])
    return tmp_path / "tasks"


def test_questions_have_one_right_answer(tasks):
    rows = [json.loads(line) for line in (tasks / "next_line.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert len(set(row["choices"])) == 4
        follows = [row["context"] + choice in TEXT for choice in row["choices"]]
        assert follows == [number == row["label"] for number in range(4)]
    assert len({row["label"] for row in rows}) > 1
    (document,) = (tasks / "python_text.jsonl").read_text().splitlines()
    assert TEXT.startswith(json.loads(document)["text"])


def test_lm_eval_reads_them(tasks, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(tmp_path / "hf")
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'hf'},dtype=float32",
        tasks=["next_line", "python_text"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
        device="cpu",
        batch_size=8,
    )["results"]
    assert 0 <= results["next_line"]["acc,none"] <= 1
    assert results["python_text"]["bits_per_byte,none"] > 0
