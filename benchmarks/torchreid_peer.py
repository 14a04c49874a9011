"""torchreid, the peer of a training: where its package lies, and its parts put together as it says.

The package is pyppbox-torchreid 1.4.1.0. It is installed without the packages that it names, into a
folder of its own, so that nothing of this environment changes; of those packages it imports four.
"""

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1] / "build" / "torchreid"  # which git does not see
VERSION = "1.4.1.0"
PACKAGES = (f"pyppbox-torchreid=={VERSION}", "opencv-python-headless", "scipy", "gdown")
SET = "reidlab_photos"  # what our photos are called there


def install(folder: Path) -> None:
    "Put the package and what its import needs into a folder, unless they lie there."
    if (folder / "pyppbox_torchreid").is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, *PACKAGES], check=True)


def why_absent(folder: Path) -> str:
    "Nothing where the package can be imported, else what is missing."
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: what is installed goes before
    try:
        with quiet():
            import pyppbox_torchreid.engine  # noqa: F401
    except ModuleNotFoundError as missing:
        return f"torchreid: no {missing.name}; --install puts it into --peer"
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    "It prints a good deal."
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def network(n_pids: int) -> torch.nn.Module:
    "Its OSNet x0.25 with random weights, for its triplet engine."
    from pyppbox_torchreid.models.osnet import osnet_x0_25

    return osnet_x0_25(n_pids, pretrained=False, loss="triplet")


def photos_there(sides: dict[str, list[tuple[str, int, int]]]) -> None:
    "Make photos known to its data manager: (path, pid, camid) of train, query and gallery."
    from pyppbox_torchreid import data

    class Ours(data.ImageDataset):
        def __init__(self, root: str = "", **how: Any):
            super().__init__(sides["train"], sides["query"], sides["gallery"], **how)

    data.register_image_dataset(SET, Ours)


def manager(size: tuple[int, int], transforms: list[str]) -> Any:
    "Its data manager: batches of 16 x 4, photos read in this process."
    from pyppbox_torchreid.data import ImageDataManager

    how = {"train_sampler": "RandomIdentitySampler", "batch_size_train": 64, "num_instances": 4}
    how |= {"batch_size_test": 128, "workers": 0, "use_gpu": False}
    return ImageDataManager(
        sources=SET, height=size[0], width=size[1], transforms=transforms, **how
    )


class Batches:
    "Stands for a data manager where batches come from memory."

    def __init__(self, n_pids: int):
        self.num_train_pids, self.train_loader, self.test_loader = n_pids, None, {}


def engine(
    manager: Any,
    model: torch.nn.Module,
    epochs: int,
    lr: float = 3e-4,
    optim: str = "adam",
    triplet: float = 1.0,  # weight of the triplet loss beside the classifier's
) -> Any:
    "Its triplet engine with its own losses, optimiser and schedule: cosine, as ours."
    from pyppbox_torchreid.engine import ImageTripletEngine
    from pyppbox_torchreid.optim import build_lr_scheduler, build_optimizer

    optimizer = build_optimizer(model, optim=optim, lr=lr)
    falls = build_lr_scheduler(optimizer, lr_scheduler="cosine", max_epoch=epochs)
    how = {"scheduler": falls, "weight_t": triplet, "use_gpu": False}
    made = ImageTripletEngine(manager, model, optimizer, **how)
    made.max_epoch = epochs
    return made
