"""Generation against a naive loop, sampling on made-up logits, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch

from megatron_ext.inference.generation import continue_tokens
from megatron_ext.runtime.errors import CHECKPOINT, USAGE
from tests.models import GPT2, LLAMA
from tests.programs import fail, read_model, succeed, write_model
from tests.ranks import run_ranks

EOD = 99
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    write_model(folder, LLAMA, lift_padding)
    return folder


def lift_padding(model):
    """Give every position a padding column above all real ones: one and its negative."""
    padding = model.output_layer.weight[LLAMA.vocab_size :]
    padding.copy_(1000 * padding)
    padding[1] = -padding[0]


def naive_greedy(folder, prompt, count, vocab_size):
    """Return the tokens after ``prompt`` and how often padding would have won."""
    model, ids, num_padding = read_model(folder), list(prompt), 0
    with torch.no_grad():
        for _ in range(count):
            tokens, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
            logits = model(tokens, positions, None)[-1, 0].tolist()
            num_padding += max(logits[:vocab_size]) < max(logits)
            ids.append(max(range(vocab_size), key=logits.__getitem__))
    return ids[len(prompt) :], num_padding


def continuations(stdout):
    """Return the tokens of each continuation that was printed."""
    parts = stdout.split("--- continuation, ")[1:]
    texts = [part.split("\n", 1)[1].split("---")[0] for part in parts]
    return [[int(word) for word in text.split()] for text in texts]


@pytest.mark.parametrize("prompts", [["3 1 4"], ["7", "92 65 35 89 79"]])
def test_greedy_is_the_naive_loop_and_never_padding(load, prompts):
    flags = ["--load", load, *NULL, "--max-new-tokens", "9", "--prompt", *prompts]
    (outcome,) = succeed("tools.generate", flags)
    found = continuations(outcome.stdout)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = [int(word) for word in prompt.split()]
        ((expected, num_padding),) = run_ranks(1, naive_greedy, load, ids, 9, LLAMA.vocab_size)
        assert EOD not in expected
        assert num_padding == 9
        assert tokens == expected
        assert f"--- prompt\n{prompt}\n" in outcome.stdout


def test_learned_positions_and_tied_embeddings(tmp_path):
    write_model(str(tmp_path), GPT2)
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(GPT2.vocab_size)]
    flags = ["--load", str(tmp_path), *null, "--max-new-tokens", "5", "--prompt", "8 16 32"]
    (outcome,) = succeed("tools.generate", flags)
    ((expected, _),) = run_ranks(1, naive_greedy, str(tmp_path), [8, 16, 32], 5, GPT2.vocab_size)
    assert continuations(outcome.stdout) == [expected]


def naive_loss(folder, prompt, new, vocab_size):
    """Return a teacher's mean loss over ``new``."""
    model, ids = read_model(folder), list(prompt) + new
    with torch.no_grad():
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)[:, 0, :vocab_size]
    losses = [
        -logits[i - 1].double().log_softmax(-1)[ids[i]].item() for i in range(len(prompt), len(ids))
    ]
    return sum(losses) / len(losses)


def test_yardsticks_beside_a_teacher(load, tmp_path):
    write_model(str(tmp_path / "teacher"), replace(LLAMA, num_layers=2))
    flags = ["--load", load, "--teacher-load", str(tmp_path / "teacher"), *NULL]
    prompts = ["3 1 4", "7"]
    flags += ["--max-new-tokens", "6", "--prompt", *prompts]
    (outcome,) = succeed("tools.generate", flags)
    found = continuations(outcome.stdout)
    losses, common = [], []
    for prompt, new in zip(prompts, found, strict=True):
        ids = [int(word) for word in prompt.split()]
        folder = str(tmp_path / "teacher")
        (loss,) = run_ranks(1, naive_loss, folder, ids, new, LLAMA.vocab_size)
        ((own, _),) = run_ranks(1, naive_greedy, folder, ids, len(new), LLAMA.vocab_size)
        losses.append(loss)
        parted = [i for i, pair in enumerate(zip(new, own, strict=True)) if len(set(pair)) > 1]
        common.append(min(parted, default=len(new)))
    lines = outcome.stdout.split("--- yardsticks, means of 2 continuations\n")[1].splitlines()
    values = [line.rsplit(None, 1)[1] for line in lines[:4]]
    assert float(values[0]) == pytest.approx(sum(losses) / 2, abs=1e-3)
    assert float(values[3]) == sum(common) / 2


def test_a_teacher_of_another_vocabulary(load, tmp_path):
    write_model(str(tmp_path), replace(LLAMA, vocab_size=90, padded_vocab_size=96))
    flags = ["--load", load, "--teacher-load", str(tmp_path), *NULL, "--prompt", "7"]
    assert fail("tools.generate", flags)[0] == CHECKPOINT


# Logits that one can read: after token t, t + 1 is the likeliest, then t + 2, ...


def counting(ids):
    return -torch.arange(6.0).roll(ids[-1] + 1)


def draw(next_logits=counting, prompt=(0,), **options):
    defaults = {"max_new_tokens": 4, "eod": 5, "vocab_size": 6}
    return continue_tokens(next_logits, list(prompt), **defaults | options)


def test_stops_before_the_end_of_document():
    assert draw() == [1, 2, 3, 4]
    assert draw(max_new_tokens=9) == [1, 2, 3, 4]
    assert draw(prompt=[4]) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e4])
def test_padding_is_never_chosen(temperature):
    def padded(ids):
        return torch.cat([counting(ids), torch.full((2,), 50.0)])

    for seed in range(20):
        assert max(draw(padded, temperature=temperature, seed=seed, eod=-1), default=0) < 6


def test_sampling():
    assert draw(temperature=1.0, top_k=1) == draw()
    assert draw(temperature=1e-4) == draw()
    assert draw(temperature=1.0, top_k=99, seed=3) == draw(temperature=1.0, seed=3)
    assert len({tuple(draw(temperature=9.0, seed=seed)) for seed in range(20)}) > 5
    for seed in range(20):
        tokens = [0, *draw(temperature=9.0, top_k=2, seed=seed)]
        assert all((b - a) % 6 in (1, 2) for a, b in itertools.pairwise(tokens))


def test_frequencies_follow_the_softmax():
    drawn = [draw(temperature=2.0, max_new_tokens=1, eod=-1, seed=s)[0] for s in range(2000)]
    found = torch.bincount(torch.tensor(drawn), minlength=6) / len(drawn)
    torch.testing.assert_close(found, (counting([0]) / 2.0).softmax(0), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("changed", "message", "code"),
    [
        (["--prompt"], "--prompt: no text behind it", USAGE),
        (["--prompt", "1", ""], "--prompt '' has no tokens", USAGE),
        (["--prompt", "1", "--prompt", "2"], "--prompt is given twice", USAGE),
        (
            ["--prompt", "1 2", "--max-new-tokens", "31"],
            "has 2 tokens; with --max-new-tokens 31 that is more than the model's 32",
            USAGE,
        ),
        (["--prompt", "1", "--top-k", "4"], "--top-k 4 needs --temperature", USAGE),
        (["--prompt", "1", "--vocab-size", "99"], "trained with 100 tokens", CHECKPOINT),
        (["--prompt", "one"], "--prompt 'one': the tokenizer refuses it", USAGE),
        (["--prompt", "100"], "--prompt '100': tokens are 0 to 99", USAGE),
        (["--prompt", "1", "--ckpt-step", "5"], "--ckpt-step 5", CHECKPOINT),
        (["--prompt", "1", "--load", "/nowhere"], "/nowhere: no finished checkpoint", CHECKPOINT),
        ([], "missing --prompt", USAGE),
    ],
)
def test_what_is_refused(load, changed, message, code):
    found_code, line = fail(
        "tools.generate", ["--load", load, *NULL, "--max-new-tokens", "8", *changed]
    )
    assert message in line
    assert found_code == code
