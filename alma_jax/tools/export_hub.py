"""A stage of a run as a repository of the Hugging Face hub: a model or a data set with its card."""

import pathlib
import shutil

from alma_jax.errors import RunError
from alma_jax.report import cards
from alma_jax.store import layout


def prepare(stage: pathlib.Path, name: str, output: pathlib.Path) -> str:
  """Write what is pushed to a new directory; "model" or "dataset".

  A training's model, or the Parquet files of a stage of records, with README.md and the run's config.
  """
  manifest = layout.load_manifest(stage)
  run = run_of(stage, manifest)
  if (stage / layout.MODEL).is_dir():
    shutil.copytree(stage / layout.MODEL, output, dirs_exist_ok=True)
    kind, card = "model", cards.model(stage, run, name.rpartition("/")[2])
  elif parts := [part["name"] for part in manifest["parts"] if part["name"].endswith(".parquet")]:
    (output / "data").mkdir(parents=True)
    for part in parts:
      shutil.copyfile(stage / part, output / "data" / part)
    kind, card = "dataset", cards.dataset(stage, run, name.rpartition("/")[2])
  else:
    raise RunError(f"{stage} holds neither a model nor records; push a policy, a trainset or a pool's prompts")
  (output / "README.md").write_text(card, encoding="utf-8")
  return kind


def push(directory: pathlib.Path, name: str, kind: str, private: bool) -> str:
  """Upload the directory with the account that `hf auth login` has left here; the repository's address."""
  import huggingface_hub

  api = huggingface_hub.HfApi()
  try:
    made = api.create_repo(name, repo_type=kind, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, repo_type=kind, folder_path=str(directory), commit_message="alma export")
  except Exception as error:  # of the network, the account or the name
    why = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    raise RunError(
      f"{name} cannot be pushed ({type(error).__name__}: {why}); what would have been pushed is in {directory}. Log in"
      " with `hf auth login`, or push it with `hf upload`"
    ) from None
  return str(made)


def run_of(stage: pathlib.Path, manifest: layout.Manifest) -> pathlib.Path:
  """The run that a stage belongs to: runs/alma of runs/alma/round_02/policy."""
  run = stage.resolve().parents[manifest["stage"].count("/")]
  if layout.config_in(run) is None:
    raise RunError(f"{stage} lies in no run directory: there is no {layout.CONFIG} of a run in {run}")
  return run
