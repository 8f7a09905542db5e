"""The models that flags name, before any of them is built: sizes, and where they stand.

A run reads checkpoints. A dry run may come before them, and then takes a config.json's word.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import SIZES
from megatron_ext.checkpoint.folder import Checkpoint, find, incomplete_reason, iterations, locate
from megatron_ext.checkpoint.quick_read import glance
from megatron_ext.cli.programs import TrainFlags, check_against_checkpoint
from megatron_ext.convert.config import Config, arch_of, with_positions
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from megatron_ext.runtime.texts import parse_json

# Import pads the vocabulary to a multiple of this by default.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Model:
    """The sizes of a model, and where they stand."""

    arch: Arch
    where: str
    """The folder or config.json as it was typed, or words."""
    checkpoint: Checkpoint | None = None
    """Its weights, as ``glance`` sees them; None: a new model, or one that is not there yet."""
    origin: Config = field(default_factory=dict)
    """config.json of the Hugging Face model that it comes from; empty of another origin."""

    def with_tokens(self, count: Callable[[], int | None]) -> "Model":
        """Return the model with the number of its tokens, counted only if it does not say so."""
        if self.checkpoint is None or self.checkpoint.knows_tokens or (number := count()) is None:
            return self
        checkpoint = self.checkpoint.with_tokens(number)
        arch = replace(self.arch, vocab_size=checkpoint.arch.vocab_size)
        return replace(self, checkpoint=checkpoint, arch=arch)


def _saved(folder: Path, where: str, sizes: Mapping[str, Any] | None = None) -> Model:
    checkpoint = glance(str(folder), sizes=sizes)
    return Model(checkpoint.arch, where, checkpoint, checkpoint.hf_config)


def model_at(
    flag: str,
    folder: str | None,
    step: int | None = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    is_dry: bool = True,
    config: str | None = None,
) -> Model:
    """Return the model that ``folder`` holds, or after a dry run will hold.

    Args:
        flag: that names the folder, for messages.
        folder: of a checkpoint.
        step: its iteration; None for the latest.
        sizes: were typed, and hold where the checkpoint says none.
        is_dry: the checkpoint need not be there yet.
        config: a Hugging Face config.json, used where there is no checkpoint.

    Raises:
        UserError: neither is there, or it cannot be read.
    """
    found = _find(folder, step, is_dry=True) if is_dry else locate(folder, step)
    if found is not None:
        return _saved(found, folder, sizes)
    option = "--teacher-config" if flag == "--teacher-load" else "--load-config"
    if config is None:
        raise UserError(
            f"{flag} {folder}: no checkpoint there yet; {option} can say the sizes.", CHECKPOINT
        )
    return Model(config_arch(option, config), config, origin=read_config(option, config))


def is_there(folder: str | None) -> bool:
    """Whether a finished checkpoint is in ``folder``."""
    return _find(folder, None, is_dry=True) is not None


def _find(folder: str | None, step: int | None, *, is_dry: bool) -> Path | None:
    """Return a finished checkpoint's folder, or None. A dry run may come before the folder."""
    if folder is None or (is_dry and not Path(folder).exists()):
        return None
    return find(folder, step)


def find_student(flags: TrainFlags) -> tuple[Model | None, bool]:
    """Return the model that a training run begins with, and whether it goes on with that run.

    It is the one of --save, else of --load, else of --pretrained-checkpoint, else, in a dry run, of
    --load-config, of whose sizes those that pruning cuts may be typed otherwise. None: a new one.

    Raises:
        UserError: --load names a folder without a checkpoint, and it is not the folder to save to;
            --save holds iterations of which none was finished; typed sizes are others.
    """
    options, dry = flags.checkpoint, flags.dry
    own = find(options.save) if options.save else None
    if own and options.save != options.load:
        return _typed(_saved(own, options.save), flags.sizes), True
    if options.save and not own:
        _check_nothing_is_lost(options.save)
    if found := _find(options.load, options.ckpt_step, is_dry=dry.dry_run):
        student = _typed(_saved(found, options.load, flags.sizes), flags.sizes)
        goes_on = options.load == options.save or not options.finetune
        return student, goes_on and student.checkpoint.iteration > 0
    is_named = options.pretrained_checkpoint or dry.load_config
    may_be_new = options.load in (None, options.save) and not options.exit_on_missing_checkpoint
    if options.load and not (is_named or may_be_new):
        hint = " (Only a run whose --load is its --save may begin without one.)"
        hint = " yet; --load-config can say the sizes." if dry.dry_run else "." + hint
        raise UserError(f"--load {options.load}: no checkpoint there{hint}", CHECKPOINT)
    if not is_named:
        return None, False
    student = model_at(
        "--pretrained-checkpoint",
        options.pretrained_checkpoint,
        sizes=flags.sizes,
        is_dry=dry.dry_run,
        config=dry.load_config,
    )
    return _typed(student, flags.sizes), False


def _check_nothing_is_lost(save: str) -> None:
    """Refuse to begin anew where iterations are: saves of this program leave whole ones only."""
    for folder in iterations(save)[:1]:
        raise UserError(
            f"--save {save}: {folder.name} is there, but {incomplete_reason(folder)}; move the "
            "iter_* folders away to begin anew, or give another --save.",
            CHECKPOINT,
        )


def _typed(model: Model, sizes: Mapping[str, Any]) -> Model:
    """Return ``model`` checked against the typed sizes; what is not there yet may be cut first."""
    return replace(model, arch=with_sizes(model.arch, sizes, may_cut=model.checkpoint is None))


def with_sizes(arch: Arch, sizes: Mapping[str, Any], *, may_cut: bool) -> Arch:
    """Return ``arch`` checked against the typed sizes.

    ``may_cut``: it is that of the model before pruning, and typed sizes that pruning cuts win.
    """
    if may_cut:
        cut = {name: sizes[name] for name in SIZES if name in sizes}
        try:
            arch = target_arch(arch, **cut)
        except UserError as error:
            raise UserError(str(error).replace("--target-", "--"), error.code) from None
    return check_against_checkpoint(sizes, arch)


def find_teacher(flags: TrainFlags) -> Model | None:
    """Return the teacher of a training run, if there is to be one."""
    folder, dry = flags.distill.teacher_load, flags.dry
    if not (folder or dry.teacher_config):
        return None
    return model_at("--teacher-load", folder, is_dry=dry.dry_run, config=dry.teacher_config)


def config_arch(
    flag: str, path: str, multiple: int = VOCAB_MULTIPLE, positions: int | None = None
) -> Arch:
    """Return the sizes in a config.json, its vocabulary padded to ``multiple`` as import does.

    ``positions`` in place of those of the file, if given.
    """
    config = with_positions(read_config(flag, path), positions)
    try:
        return arch_of(config, make_vocab_size_divisible_by=multiple)
    except ValueError as error:
        raise UserError(f"{flag} {path}: {error}.", CHECKPOINT) from None


def read_config(flag: str, path: str) -> dict[str, Any]:
    """Return what a config.json holds."""
    try:
        config = parse_json(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} {path} cannot be read: {reason}.", CHECKPOINT) from error
    if not isinstance(config, dict):
        raise UserError(f"{flag} {path}: holds no table of settings.", CHECKPOINT)
    return config
