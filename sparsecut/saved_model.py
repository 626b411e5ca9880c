"""Models as files: weights are checked when they are read, adapters of parts lie beside them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from .adapters import (
    FOLDER,
    check_no_other_adapters,
    fetch_adapters,
    find_plain_names,
    get_adapters,
    load_adapters,
    save_adapters,
    strip_adapters,
)
from .hub import check_hub_answers
from .loading import check_finite, check_loaded_weights, find_compute_dtype, is_quantized
from .schema import UserError


class SavedModel(PreTrainedModel):
    """Reads and writes a model as transformers does, with the adapters that its parts have."""

    @classmethod
    def from_pretrained(
        cls, name: Any, *args: Any, output_loading_info: bool = False, **settings: Any
    ) -> Any:
        """Load a model as transformers does, and refuse one whose weights are not all its own.

        Adapters that lie beside it are put on its parts.

        Args:
            name: A folder or a hub name. With `state_dict={}` instead the model is a new one.
            *args: As transformers takes them.
            output_loading_info: Return what is missing and unknown too, and refuse nothing.
            **settings: As transformers takes them.

        Raises:
            UserError: Weights are missing, unknown or not finite, or PEFT is missing.
        """
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **settings)
        has_files = name is not None and settings.get("state_dict") is None
        has_weights = name is not None or settings.get("state_dict")
        if has_weights and not output_loading_info:
            source = str(name or "state_dict")
            check_loaded_weights(model, info, source)
            check_finite(model, source)
        if is_quantized(model.config):
            model.fusion.to(find_compute_dtype(model))
        if has_files:
            load_adapters(model, fetch_adapters(name, settings))
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **settings: Any,
    ) -> None:
        """Write the model as transformers does, and adapters apart from the weights, beside them.

        Raises:
            UserError: The folder holds adapters of parts that have none here.
        """
        if settings.get("push_to_hub"):
            name = settings.get("repo_id") or Path(save_directory).name
            check_hub_answers(name, settings.get("token"))
        check_no_other_adapters(self, Path(save_directory))
        if get_adapters(self):
            state_dict = strip_adapters(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, **settings)
        if is_main_process:
            save_adapters(self, Path(save_directory))

    def push_to_hub(self, repo_id: str, *args: Any, **settings: Any) -> str:
        """Push as transformers does, card and adapters too; a hub that is away is told quickly."""
        check_hub_answers(repo_id, settings.get("token"))
        return super().push_to_hub(repo_id, *args, **settings)

    def load_state_dict(self, state_dict: Any, *args: Any, **settings: Any) -> Any:
        """Take weights as torch does; those of a model without its adapters are refused.

        Raises:
            UserError: The model has adapters, and the weights are named as without them.
        """
        found = find_plain_names(self, state_dict) if get_adapters(self) else []
        if found:
            raise UserError(
                f"these weights are those of a model without adapters ({found[0]}), but here that"
                " layer has an adapter, so it would keep the weight that it has; load the folder"
                " with sparsecut.load, or merge the adapters before another trainer goes on"
                " (sparsecut.adapters.merge_adapters)"
            )
        return super().load_state_dict(state_dict, *args, **settings)

    def _upload_modified_files(
        self, working_dir: Any, repo_id: str, files_timestamps: dict, **settings: Any
    ) -> Any:
        """As transformers does, with adapters; a card that it made for want of one becomes ours."""
        folder = Path(working_dir)
        save_adapters(self, folder)
        # transformers would take the folders of single adapters for files.
        known = files_timestamps | {FOLDER: float("inf")}
        # By name: code saved beside a model has no such module, and transformers' card is pushed.
        if find_spec(f"{__package__}.sharing") is not None:
            sharing = import_module(f"{__package__}.sharing")
            token = settings.get("token")
            if not sharing.mend_pushed_card(folder, self.config, repo_id, token=token):
                known[sharing.CARD] = float("inf")
        pushed = super()._upload_modified_files(working_dir, repo_id, known, **settings)
        if get_adapters(self):
            HfApi(token=settings.get("token")).upload_folder(
                repo_id=repo_id,
                folder_path=folder / FOLDER,
                path_in_repo=FOLDER,
                commit_message="Upload adapters",
                revision=pushed.pr_revision or settings.get("revision"),
            )
        return pushed
