"""BERT-base from Hugging Face, pruned to 13 million parameters, distilled, and back.

    python examples/bert/run.py [OUT]        default OUT: runs/bert

Each step runs once; started again, the script goes on after the last one. OUT/steps.json has the
seconds and the memory of every step.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Two processes with a core each. Memory that was freed is kept: fresh pages cost more than sums.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "99999999999",
}
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
TOKENIZER = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {out}/hf-base"
TRAIN = "--train-data-path {out}/data/train_text_document"
VALID = "--valid-data-path {out}/data/valid_text_document"
SHAPE = "--seq-length 128 --micro-batch-size 4 --num-workers 0"
PREPROCESS = f"tools/preprocess_data.py --append-eod {TOKENIZER} --input {{out}}/corpus/"
EVALUATE = (
    f"{TORCHRUN} tools/evaluate.py --teacher-load {{out}}/teacher --eval-samples 64 {SHAPE} "
    f"--data-path {{out}}/data/valid_text_document {TOKENIZER}"
)
STEPS = {
    "corpus": "examples/from-scratch/corpus.py --output {out}/corpus",
    "make": "examples/bert/make_bert.py --text {out}/corpus/train.jsonl --output {out}/hf-base",
    "data": f"{PREPROCESS}train.jsonl --output-prefix {{out}}/data/train",
    "valid": f"{PREPROCESS}valid.jsonl --output-prefix {{out}}/data/valid",
    "import": "tools/convert.py import --hf {out}/hf-base --save {out}/teacher",
    "check-import": "examples/bert/check.py --load {out}/teacher --hf {out}/hf-base",
    "prune": (
        f"{TORCHRUN} prune.py --load {{out}}/teacher --save {{out}}/pruned "
        f"--tensor-model-parallel-size 2 --sequence-parallel {TRAIN} {TOKENIZER} {SHAPE} "
        "--calibration-samples 64 --target-hidden-size 256 --target-num-attention-heads 4 "
        "--target-ffn-hidden-size 1024 --target-num-layers 6 --scores {out}/scores.safetensors"
    ),
    "distil": (
        f"{TORCHRUN} pretrain_distill.py --load {{out}}/pruned --teacher-load {{out}}/teacher "
        f"--save {{out}}/student --save-interval 10 {TRAIN} {VALID} {TOKENIZER} {SHAPE} "
        "--global-batch-size 16 --train-iters 20 --lr 1e-3 --lr-warmup-iters 2 "
        "--lr-decay-style cosine --log-interval 1 --eval-interval 20 --eval-iters 2"
    ),
    "evaluate-pruned": f"{EVALUATE} --load {{out}}/pruned --json {{out}}/pruned.json",
    "evaluate-student": f"{EVALUATE} --load {{out}}/student --json {{out}}/student.json",
    "export": "tools/convert.py export --load {out}/student --hf {out}/hf-student",
    "check-export": "examples/bert/check.py --load {out}/student --hf {out}/hf-student",
}


def main() -> int:
    """Run what is missing and print the table of all steps."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs/bert").resolve()
    (out / "data").mkdir(parents=True, exist_ok=True)
    path = out / "steps.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for name, command in STEPS.items():
        if name in done:
            continue
        print(f"=== {name}", flush=True)
        argv = [sys.executable, *shlex.split(command.format(out=shlex.quote(str(out))))]
        code, figures = run(argv)
        if code:
            print(f"ERROR: step {name} ended with code {code}, see above.", file=sys.stderr)
            return code
        done[name] = figures
        path.write_text(json.dumps(done, indent=1) + "\n")
    print(f"\n{'step':20}{'seconds':>10}{'CPU s':>10}{'GiB':>8}")
    for name, (seconds, cpu, gib) in done.items():
        print(f"{name:20}{seconds:10.1f}{cpu:10.1f}{gib:8.2f}")
    totals = [sum(column) for column in zip(*done.values(), strict=True)]
    print(f"{'all':20}{totals[0]:10.1f}{totals[1]:10.1f}")
    return 0


def run(argv: list[str]) -> tuple[int, list[float]]:
    """Return the code, and the seconds, the CPU seconds and the GiB of the largest process."""
    began = time.perf_counter()
    process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    return code, [round(x, 2) for x in (seconds, cpu, usage.ru_maxrss / 2**20)]


if __name__ == "__main__":
    sys.exit(main())
