"""Save the trained student in student/, as it was evaluated, and compare what was saved with the model in memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from ..files import remove, replace_folder
from ..models.adapters import merged, without_adapters
from ..models.saved import SavedModelDiffers, check_saved, name_magnitudes, probe_log_probs
from ..models.sharding import is_sharded

if TYPE_CHECKING:
    from .build import Run

_MERGED = "merged"  # a folder inside student.partial


def save_student(run: "Run") -> None:
    """Save the student and its tokenizer in student/ atomically; adapters are merged if the recipe says so.

    Raises:
        SavedModelDiffers: if what would be loaded from student/ is another model, on every process. Of adapters that
            were to be merged, student/ holds the adapters then.
    """
    trainer, partial = run.trainer, run.folder.student_partial
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.args.should_save:
        remove(partial)
    trainer.accelerator.wait_for_everyone()
    try:
        _save(run, model, partial)
        error = ""
    except SavedModelDiffers as reason:
        where = (
            "student/ holds the adapters, unmerged" if run.recipe.student.merge else "the checkpoints are unaffected"
        )
        error = f"the student cannot be saved as it was trained: {reason}; {where}"
    if trainer.args.should_save:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml has the same content
        if run.recipe.student.merge and not error:
            replace_folder(partial / _MERGED, run.folder.student)
            remove(partial)
        else:
            remove(partial / _MERGED)
            replace_folder(partial, run.folder.student)
    trainer.accelerator.wait_for_everyone()
    [error] = broadcast_object_list([error])
    if error:
        raise SavedModelDiffers(error)


def _save(run: "Run", model: Any, partial: Path) -> None:
    """Save into the folder `partial`, or its folder `merged`, and load it again."""
    trainer, student = run.trainer, run.recipe.student
    sampling = trainer.writers.student.sampling
    stops = (sampling.stop_ids, run.tokenizer.pad_token_id)
    sharded = is_sharded(model)
    expected = probe_log_probs(model) if sharded else None  # by all processes together
    if sharded and student.merge:
        model = _whole(run)
        if model is None:
            return
    run.origin.restore_settings(without_adapters(model), *stops)
    if student.merge:
        if trainer.args.should_save:
            model.save_pretrained(partial)
            name_magnitudes(partial)
            run.tokenizer.save_pretrained(partial)
        model, partial = merged(model), partial / _MERGED
    if not hasattr(model, "peft_config") and not is_sharded(model):
        run.origin.restore(model, student.save_dtype, *stops)
    if student.merge:
        if trainer.args.should_save:
            model.save_pretrained(partial)
            run.tokenizer.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if not trainer.args.should_save:
        return
    if hasattr(model, "peft_config"):
        without_adapters(model).generation_config.save_pretrained(partial)
        name_magnitudes(partial)
    expected = probe_log_probs(model) if expected is None else expected
    check_saved(partial, expected, model, rounding=trainer.args.bf16 or trainer.args.fp16)


def _whole(run: "Run") -> Any:
    """A whole student with the trained weights of a sharded one, in the process that saves; None in the others."""
    trainer = run.trainer
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return None
    model = run.load_student()
    model.load_state_dict(state)
    return model
