"""Candidates of a search space: the paper's two enumerations, the files, and prune.py with them."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from megatron_ext.arch import num_parameters
from megatron_ext.checkpoint import checkpoints
from megatron_ext.pruning import search
from megatron_ext.pruning.budget import Limit, Use, kv_bytes, read_budget
from megatron_ext.pruning.scores_file import load_scores
from megatron_ext.pruning.search import as_yaml, auto_space, read_space, table
from megatron_ext.pruning.targets import read_targets
from megatron_ext.runtime.errors import USAGE, UserError
from tests.models import GPT2, LLAMA, MOE, WINDOWS
from tests.programs import assert_same_bytes, fail, read_tensors, succeed, write_model
from tests.test_arch import NEMOTRON_15B

# arXiv:2407.14679, Table 9, with 4608 for its misprint 4680.
SPACE = {
    "num_layers": [29, 30, 31, 32],
    "num_attention_heads": [24, 32, 48],
    "ffn_hidden_size": ["2.5x", "3x", "3.5x", "4x"],
    "hidden_size": [2560, 3072, 3584, 4096, 4608],
}


USE = Use(context=32, batch=1)


def candidates(source, space, low, high):
    return search.candidates(source, space, [Limit("params", low, high)], USE)


def sizes_within(space, low, high):
    found = candidates(NEMOTRON_15B, space, low, high)
    return [tuple(getattr(arch, name) for name in space) for arch in found.values()]


def numbers(text):
    return {tuple(map(int, sizes.split(","))) for sizes in text.split()}


def test_the_18_candidates_of_4_billion():
    expected = """
    29,24,9216,3072 29,32,7680,3072 29,32,9216,3072 29,48,10240,2560 30,24,9216,3072 30,32,7680,3072
    30,48,10240,2560 31,24,7680,3072 31,24,9216,3072 31,32,7680,3072 31,48,8960,2560
    31,48,10240,2560 32,24,7680,3072 32,24,9216,3072 32,32,7680,3072 32,32,10240,2560
    32,48,8960,2560 32,48,10240,2560
    """
    found = sizes_within(SPACE, 3.8e9, 4.2e9)
    assert len(found) == 18
    assert set(found) == numbers(expected)
    released = candidates(NEMOTRON_15B, SPACE, 3.8e9, 4.2e9)["L32-A24-F9216-H3072"]
    assert num_parameters(released) == 4_190_509_056


def test_the_15_candidates_of_8_billion():
    expected = """
    32,32,12800,5120 32,32,13824,4608 32,48,11520,4608 32,48,16384,4096 31,32,12800,5120
    31,32,16128,4608 31,48,13824,4608 31,48,16384,4096 30,32,12800,5120 30,32,16128,4608
    30,48,13824,4608 30,48,16384,4096 29,32,12800,5120 29,32,16128,4608 29,48,13824,4608
    """
    space = SPACE | {
        "num_attention_heads": [32, 48],
        "hidden_size": [4096, 4608, 5120, 5632, 6144],
    }
    found = sizes_within(space, 7.8e9, 8.5e9)
    assert len(found) == 15
    assert set(found) == numbers(expected)
    assert len(sizes_within(space, 7.6e9, 8.4e9)) == 18  # a strict 8e9 +- 5 %


def test_the_order_is_that_of_the_space_and_what_contradicts_itself_is_passed_over():
    space = {"num_query_groups": [1, 2], "num_attention_heads": [1, 3, 2], "hidden_size": [48, 24]}
    found = candidates(LLAMA, space, 0, 1e9)
    assert list(found) == [
        f"G{groups}-A{heads}-H{hidden}"
        for groups, heads in ((1, 1), (1, 2), (2, 2))
        for hidden in (48, 24)
    ]
    assert found["G1-A2-H24"] == replace(
        LLAMA, num_query_groups=1, num_attention_heads=2, hidden_size=24
    )


def test_multiples_of_the_width_are_whole_and_not_larger_than_in_the_source():
    space = {"hidden_size": [48, 21], "ffn_hidden_size": ["1.5x", "2x"]}
    found = candidates(LLAMA, space, 0, 1e9)
    assert list(found) == ["H48-F72", "H21-F42"]  # not 2 x 48 = 96 of 80, not 31.5


def test_experts():
    space = {"num_experts": [1, 2, 4], "moe_ffn_hidden_size": [22, "0.5x"]}
    found = candidates(MOE, space, 0, 1e9)
    assert list(found) == ["E2-EF22", "E2-EF12", "E4-EF22", "E4-EF12"]  # two compute a token


def test_where_nothing_is_within_the_band_the_nearest_counts_are_named():
    space = {"hidden_size": [48, 24]}
    counts = sorted(num_parameters(a) for a in candidates(LLAMA, space, 0, 1e9).values())
    below, above = (f"{count:,}" for count in counts)
    with pytest.raises(UserError, match=f"none of 2 models .*{below} below, {above} above"):
        candidates(LLAMA, space, counts[0] + 1, counts[1] - 1)
    with pytest.raises(UserError, match=f"nearest: {below} above.$"):
        candidates(LLAMA, space, 1, 2)
    with pytest.raises(UserError, match=f"nearest: {above} below.$"):
        candidates(LLAMA, space, 1e9, 2e9)
    with pytest.raises(UserError, match="no valid model"):
        candidates(LLAMA, {"num_attention_heads": [3]}, 0, 1e9)


@pytest.mark.parametrize(
    ("text", "arch", "words"),
    [
        ("hidden_sice: [8]", LLAMA, ["hidden_sice", "hidden_size"]),
        ("hidden_size: [48, 49]", LLAMA, ["hidden_size", "49", "48"]),
        ("ffn_hidden_size: [81]", LLAMA, ["ffn_hidden_size", "81", "80"]),
        ("num_experts: [2]", LLAMA, ["num_experts", "none"]),
        ("ffn_hidden_size: [2x]", MOE, ["ffn_hidden_size", "none"]),
        ("hidden_size: 48", LLAMA, ["hidden_size", "48", "list of whole numbers"]),
        ("hidden_size: []", LLAMA, ["hidden_size", "list of whole numbers"]),
        ("hidden_size: [2x]", LLAMA, ["hidden_size", "list of whole numbers"]),
        ("ffn_hidden_size: [x2]", LLAMA, ["ffn_hidden_size", "multiples of hidden_size as 2.5x"]),
        ("ffn_hidden_size: [2.5]", LLAMA, ["ffn_hidden_size", "multiples of hidden_size as 2.5x"]),
        ("- 3", LLAMA, ["needs lines like"]),
        ("{", LLAMA, ["cannot be read"]),
    ],
)
def test_bad_spaces(text, arch, words, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_space(path, arch)
    assert all(word in str(error.value) for word in [f"--search-space {path}", *words])
    assert "\n" not in str(error.value)


# Budgets.


def test_costs_that_one_can_count():
    """NEMOTRON_15B: 32 layers, 8 query groups of 128 channels, keys and values of 2 bytes."""
    limits = read_budget("kv-bytes=1x,weight-bytes=1x", NEMOTRON_15B, Use(context=4096, batch=3), 0)
    assert [limit.high for limit in limits] == [
        32 * 8 * 128 * 2 * 2 * 4096 * 3,
        2 * num_parameters(NEMOTRON_15B),
    ]
    (active,) = read_budget("active=1x", MOE, USE, 0)
    assert active.high == num_parameters(MOE, active=True) < num_parameters(MOE)
    (flops,) = read_budget("flops=1x", LLAMA, USE, 0)
    # Two operations for each weight of a matrix; scores and values of the 32 tokens before it.
    matrices = LLAMA.num_layers * (
        LLAMA.hidden_size * LLAMA.kv_channels * 2 * (LLAMA.num_attention_heads + 2)
        + 3 * LLAMA.hidden_size * LLAMA.ffn_hidden_size
    )
    assert LLAMA.num_query_groups == 2
    assert LLAMA.swiglu
    seen = LLAMA.num_layers * 2 * 32 * LLAMA.num_attention_heads * LLAMA.kv_channels
    assert flops.high == 2 * (matrices + seen + LLAMA.padded_vocab_size * LLAMA.hidden_size)


@pytest.mark.parametrize(
    ("text", "high"),
    [("params=2.5e3", 2500), ("kv-bytes=2KiB", 2048), ("active=3M", 3e6), ("params=0.25x", None)],
)
def test_units(text, high):
    (limit,) = read_budget(text, LLAMA, USE, tolerance=0.1)
    high = num_parameters(LLAMA) / 4 if high is None else high
    assert (limit.low, limit.high) == (pytest.approx(0.9 * high), high)


@pytest.mark.parametrize("text", ["params", "size=3", "params=much", "params=2TB", "params=1e9,"])
def test_bad_budgets(text):
    with pytest.raises(UserError, match=f"--target-budget {text}: .* write params, non-embedding"):
        read_budget(text, LLAMA, USE, 0.1)


def test_no_limit_is_exceeded_and_one_is_reached():
    space = {"hidden_size": [48, 40, 24], "num_layers": [4, 2], "num_query_groups": [2, 1]}
    limits = read_budget("params=0.6x,kv-bytes=0.5x", LLAMA, USE, 0.05)
    found = search.candidates(LLAMA, space, limits, USE)
    everything = search.candidates(LLAMA, space, [Limit("params", 0, 1e12)], USE)
    assert 0 < len(found) < len(everything)
    for name, arch in everything.items():
        params = num_parameters(arch) / num_parameters(LLAMA)
        cache = arch.num_layers * arch.num_query_groups / 8
        exceeds = params > 0.6 or cache > 0.5
        reaches = params >= 0.57 or cache >= 0.475
        assert (name in found) == (reaches and not exceeds), name


def test_the_space_that_nobody_writes():
    space = auto_space(NEMOTRON_15B)
    assert space["num_layers"] == [32, 28, 24, 20, 16]
    assert space["hidden_size"] == [6144, 5376, 4608, 3840, 3072]
    assert set(space) == {"num_layers", "hidden_size", "ffn_hidden_size"}
    half = search.candidates(
        NEMOTRON_15B, space, read_budget("non-embedding=0.5x", NEMOTRON_15B, USE, 0.05), USE
    )
    assert {arch.num_layers for arch in half.values()} >= {32, 20}  # deep and narrow, and short
    experts = auto_space(MOE)["num_experts"]
    assert experts[0] == MOE.num_experts
    assert min(experts) >= MOE.moe_router_topk


def test_the_table_and_the_file_of_targets(tmp_path):
    path = tmp_path / "targets.yaml"
    space = {"hidden_size": [48, 24], "num_attention_heads": [2], "ffn_hidden_size": ["1x"]}
    found = candidates(LLAMA, space, 0, 1e9)
    path.write_text(as_yaml(found, space))
    assert read_targets(path, LLAMA) == found
    head, *rows = table(found).splitlines()
    assert head.split() == ["hidden_size", "ffn_hidden_size", "parameters", "without", "embeddings"]
    for row, (name, arch) in zip(rows, found.items(), strict=True):
        counts = [num_parameters(arch), num_parameters(arch, embeddings=False)]
        sizes = [arch.hidden_size, arch.ffn_hidden_size, *counts]
        assert re.split(" +", row) == [name, *(f"{size:,}" for size in sizes)]


def test_needs_no_megatron():
    code = "import sys, megatron_ext.pruning.search; print('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# prune.py. Random scores: candidates do not depend on how units are scored.


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gpt2"))
    write_model(folder, GPT2)
    return folder


def search_flags(gpt2, tmp_path, params=13_000):
    space = tmp_path / "space.yaml"
    space.write_text("num_layers: [2, 3]\nhidden_size: [32, 16]\n")  # 10,672 to 30,072 parameters
    flags = ["--load", gpt2, "--importance", "random", "--seq-length", "16"]
    flags += ["--micro-batch-size", "1", "--search-space", str(space)]
    return [*flags, "--target-params", str(params), "--target-tolerance", "0.3"]


def test_every_candidate_is_pruned_from_one_set_of_scores(gpt2, tmp_path):
    save, scores, plans = (str(tmp_path / name) for name in ("save", "scores", "plans"))
    files = ["--save", save, "--scores", scores, "--plan", plans]
    outcomes = succeed("prune", [*search_flags(gpt2, tmp_path), *files], 2)
    assert "L2-H16 " in outcomes[0].stdout
    assert {p.name for p in (tmp_path / "save").iterdir()} == {"L2-H16", "L3-H16"}
    assert {p.name for p in (tmp_path / "plans").iterdir()} == {"L2-H16.json", "L3-H16.json"}
    for layers in (2, 3):
        pruned = checkpoints.read(f"{save}/L{layers}-H16").arch
        assert pruned == replace(GPT2, num_layers=layers, hidden_size=16)
    assert load_scores(scores).aggregation.startswith("random")


def test_candidates_as_a_file_that_is_then_read(gpt2, tmp_path):
    targets, flags = tmp_path / "targets.yaml", search_flags(gpt2, tmp_path)
    argv = [word for word in flags if word not in ("--importance", "random")]  # no data needed
    succeed("prune", [*argv, "--targets", str(targets)], 2)
    entries = yaml.safe_load(targets.read_text())
    assert entries == {f"L{n}-H16": {"num_layers": n, "hidden_size": 16} for n in (2, 3)}
    assert {path.name for path in tmp_path.iterdir()} == {"space.yaml", "targets.yaml"}

    targets.write_text("mine: {num_layers: 2, hidden_size: 16}\n")
    outcomes = succeed(
        "prune", [*flags, "--targets", str(targets), "--save", str(tmp_path / "a")], 2
    )
    assert f"NOTE: --targets {targets} exists and holds" in outcomes[0].stdout
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    succeed("prune", [*flags, "--save", str(tmp_path / "b")])
    both = (read_tensors(str(tmp_path / name)) for name in ("a/mine", "b/L2-H16"))
    assert_same_bytes(*both)


def test_refused_with_nothing_written(gpt2, tmp_path):
    argv = [*search_flags(gpt2, tmp_path, params=1000), "--save", str(tmp_path / "save")]
    code, message = fail("prune", argv, 2)
    assert code == USAGE
    assert "none of 4 models of the search space fits: 700 to 1,300 params, the nearest" in message
    assert "\n" not in message
    argv[argv.index("--search-space") + 1] = str(tmp_path / "none")
    code, message = fail("prune", argv, 2)
    assert (code, "\n" in message) == (USAGE, False)
    assert f"--search-space {tmp_path}/none cannot be read" in message
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_a_window_bounds_what_is_kept_of_a_sequence():
    """Three layers keep 4 tokens, one keeps all; 2 groups of 16 channels, keys and values, bf16."""
    of_token, use = 2 * 2 * 16 * 2, Use(context=100, batch=3)
    assert kv_bytes(WINDOWS, use) == of_token * (3 * 4 + 100) * 3
    assert kv_bytes(replace(WINDOWS, window_attn_skip_freq=None), use) == of_token * 4 * 4 * 3
    assert kv_bytes(LLAMA, use) == of_token * 4 * 100 * 3
