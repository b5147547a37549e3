"""Checkpoints: complete or absent, verified as they are read, loadable in any layout, free of pickle.

A checkpoint is a folder `step-00000100`: `rank-N.safetensors` with what rank N holds and no earlier
rank writes, `state.json` with what is no tensor, and `manifest.json`, written last: every file with
its checksums, every tensor with its shape, and the model. It is written under another name and
renamed when everything is on disk; on object stores, which cannot rename, the manifest comes last.
"""

from .keeping import latest_good as latest_good
from .keeping import list_checkpoints as list_checkpoints
from .keeping import step_name as step_name
from .loading import check_model as check_model
from .loading import load as load
from .loading import load_weights as load_weights
from .loading import resume as resume
from .manifest import FORMAT as FORMAT
from .manifest import MANIFEST as MANIFEST
from .manifest import STATE as STATE
from .manifest import open_checkpoint as open_checkpoint
from .manifest import verify as verify
from .saving import Saver as Saver
from .saving import checkpoints_folder as checkpoints_folder
from .saving import save as save
