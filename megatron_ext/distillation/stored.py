"""A teacher's likeliest tokens on disk: distillation without the teacher in memory.

A folder of ``tools/store_teacher.py``:

    index.json                    what they are of, see ``StoreIndex``
    samples-000000000.safetensors, ...
        tokens     [n, s, K] int32     teacher's likeliest tokens, the likeliest first
        log_probs  [n, s, K] float32   over the whole vocabulary, in nats
        digests    [n] int64           of the samples' tokens and labels
    with the SHA-256 of the three in its metadata
"""

import functools
import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import Dataset

from megatron_ext.distillation.losses import KD_LOSS, LM_LOSS
from megatron_ext.distillation.model import Distillation, StudentStage
from megatron_ext.distillation.store_index import INDEX, StoreIndex, read_index
from megatron_ext.distillation.topk import TopK, vocab_parallel_top_k_kl
from megatron_ext.model.build import LanguageModel
from megatron_ext.runtime.errors import DATA, UserError, warn
from megatron_ext.runtime.files import written_aside

# What a stored teacher adds to a batch; shapes [b, s, K].
TOKENS, LOG_PROBS = STORED = ("teacher_tokens", "teacher_log_probs")


CONTENT = {"tokens", "log_probs", "digests"}
SHA256 = "sha256"
"""Name of the tensors' hash in a file's metadata."""
ROUNDING = 1e-3
"""Nats by which a log-probability may be above 0."""


def file_of(folder: str | Path, first: int) -> Path:
    """Return the file that begins with sample ``first``."""
    return Path(folder) / f"samples-{first:09d}.safetensors"


def digest(sample: dict[str, Tensor]) -> int:
    """Return 63 bits that tell samples apart: of the tokens and labels, [s] each."""
    whole = torch.cat([sample["tokens"], sample["labels"]]).to(torch.int64)
    found = hashlib.blake2b(whole.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(found, "little") >> 1


def begin(folder: str | Path, index: StoreIndex) -> list[int]:
    """Write the index, or check that it is there, and return the files to make. On one rank.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    path = Path(folder) / INDEX
    if path.exists():
        found = read_index(folder)
        for field in fields(StoreIndex):
            if getattr(found, field.name) != getattr(index, field.name):
                raise UserError(
                    f"{folder} holds a store with {field.name} {getattr(found, field.name)}, not "
                    f"{getattr(index, field.name)}: go on with the same flags, or take another.",
                    DATA,
                )
    else:
        with written_aside(path) as aside:
            aside.write_text(json.dumps(asdict(index), indent=1) + "\n")
    return [first for first in index.firsts if not file_of(folder, first).exists()]


def write(folder: str | Path, first: int, top: TopK, digests: list[int]) -> None:
    """Write one file; ``top`` [n, s, K] on the CPU. It appears at the end, complete."""
    tensors = {
        "tokens": top.tokens.to(torch.int32).contiguous(),
        "log_probs": top.log_probs.float().contiguous(),
        "digests": torch.tensor(digests, dtype=torch.int64),
    }
    path = file_of(folder, first)
    _check_range(path, tensors, None)
    with written_aside(path) as aside:
        save_file(tensors, aside, {SHA256: content_sha256(tensors)})


def content_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors of a file, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


def _check_range(path: Path, tensors: dict[str, Tensor], vocab_size: int | None) -> None:
    """Refuse what is no log-probability and no token; ``vocab_size`` None: any number."""
    log_probs, tokens = tensors["log_probs"], tensors["tokens"]
    if not (log_probs <= ROUNDING).all():  # false of NaN too
        raise UserError(
            f"{path}: the teacher's log-probabilities are NaN or above 0: check its weights and "
            "dtype.",
            DATA,
        )
    if vocab_size is not None and not ((tokens >= 0) & (tokens < vocab_size)).all():
        raise UserError(
            f"{path} holds tokens from {tokens.min()} to {tokens.max()}, the vocabulary has "
            f"{vocab_size}.",
            DATA,
        )


class WithStoredTeacher(Dataset):
    """A training data set whose samples carry what a store holds of them."""

    def __init__(self, dataset: Dataset, folder: str | Path):
        self.dataset, self.folder = dataset, Path(folder)
        self.index = read_index(folder)

    def __len__(self) -> int:
        return min(len(self.dataset), self.index.num_samples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return the sample with ``TOKENS`` int64 and ``LOG_PROBS`` float32, [s, K] each."""
        row = number % self.index.samples_per_file
        file = _open(file_of(self.folder, number - row))
        return {
            **self.dataset[number],
            TOKENS: file.get_slice("tokens")[row].long(),
            LOG_PROBS: file.get_slice("log_probs")[row],
        }

    def _checked(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors of a file as they were written."""
        file = _open(path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = (file.metadata() or {}).get(SHA256)
        if expected is None and tensors.keys() == CONTENT:
            warn(f"{path}: no {SHA256}; damage would go unnoticed.")
        elif content_sha256(tensors) != expected or tensors.keys() != CONTENT:
            raise UserError(
                f"{path} is damaged: its SHA-256 is another; remove the file and run "
                "tools/store_teacher.py again.",
                DATA,
            )
        _check_range(path, tensors, self.index.vocab_size)
        return tensors

    def check(self, num_samples: int, rank: int, world_size: int) -> None:
        """Compare this rank's share of the samples with those that were stored. No collectives.

        Raises:
            UserError: on this rank; too few samples, a file is missing or damaged, or a sample is
                another than the teacher saw: other data, another order or another tokenizer.
        """
        index = self.index
        if num_samples > index.num_samples:
            raise UserError(
                f"--kd-teacher-store {self.folder} has {index.num_samples} samples, the run needs "
                f"{num_samples}: store with its --train-iters and --global-batch-size.",
                DATA,
            )
        for first in index.firsts[rank::world_size]:
            path = file_of(self.folder, first)
            if not path.exists():
                raise UserError(
                    f"{path} is missing: run tools/store_teacher.py again to go on with it.", DATA
                )
            digests = self._checked(path)["digests"].tolist()
            for number, stored in enumerate(digests[: num_samples - first], first):
                if digest(self.dataset[number]) != stored:
                    raise UserError(
                        f"--kd-teacher-store {self.folder}: sample {number} is not the one that "
                        "was stored: the data, --split, --seed, --seq-length, --train-iters x "
                        "--global-batch-size and tokenizer must be the same.",
                        DATA,
                    )


@functools.lru_cache(maxsize=8)
def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.", DATA) from error


class StoredDistillationModel(StudentStage):
    """A student whose teacher is on disk, as one pipeline stage.

    ``forward`` returns what the student's stage does, and per-token losses {name: [b, s]} on the
    last; in evaluation the language-model loss alone, for which nothing is stored.
    """

    def __init__(
        self,
        student: LanguageModel,
        distillation: Distillation,
        tp_group: ProcessGroup,
    ):
        super().__init__(student.config, student)
        self.distillation, self.tp_group = distillation, tp_group

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take the previous stage's output."""
        self.student.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        teacher_tokens: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Run the student; teacher_* are [b, s, K], all others [b, s]."""
        output = self.student(input_ids, position_ids, attention_mask)
        if not self.post_process:
            return output
        losses, settings = {}, self.distillation.logit_loss
        if self.training:
            top = TopK(teacher_tokens.transpose(0, 1), teacher_log_probs.transpose(0, 1))
            count = settings.top_k or top.tokens.size(-1)
            loss = vocab_parallel_top_k_kl(
                output,
                TopK(*(x[..., :count] for x in top)),
                rest=settings.top_k_rest,
                temperature=settings.temperature,
                vocab_size=self.distillation.vocab_size,
                tp_group=self.tp_group,
            )
            factor = settings.temperature**2 if settings.temperature_squared else 1.0
            losses[KD_LOSS] = factor * loss.transpose(0, 1)
        if self.distillation.lm_loss_weight or not self.training:
            logits = output.clone() if output.dtype.itemsize >= 4 else output
            losses[LM_LOSS] = self.student.compute_language_model_loss(labels, logits)
        return losses
