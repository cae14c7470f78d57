"""Log the best model as an MLflow model that serves pictures without this package and without pickle."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import io
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cvdist.models.servable import servable
from cvdist.tracking.run import RunRef, default_store, mlflow_client

if TYPE_CHECKING:
    from cvdist.checkpoints.format import Normalization
    from cvdist.results import ModelIdentity

_SCRIPT = str(Path(__file__).with_name("served.py"))


def log_model(
    ref: RunRef,
    model: nn.Module,
    identity: ModelIdentity,
    normalization: Normalization,
    precision: str,
    example: Tensor,
    step: int,
    thresholds: Sequence[float] = (),
) -> None:
    """Log a model with signature and input example, under the name `model`.

    It consists of the network in PyTorch's `pt2` format (an exported graph and tensors) and of a script that
    decodes pictures for it, `cvdist.tracking.served`. Its metadata names the architecture, the classes and the
    preprocessing.

    Args:
        ref: The run.
        model: The model.
        identity: Architecture, classes and input shape of the model.
        normalization: How pictures are normalized, and brought to the size of the model.
        precision: The precision that it was trained in, which it is served in where that is fast.
        example: Example of pixels, uint8 (n, C, H, W), n >= 2.
        step: The epoch that the model is from.
        thresholds: With several labels per picture, the least probability of each class.
    """
    client = mlflow_client(ref.tracking_uri)
    outputs = client.get_run(ref.run_id).outputs
    if outputs and any(output.step == step for output in outputs.model_outputs):
        return  # already logged: a finished run was started again
    import mlflow
    import mlflow.pytorch
    from mlflow.models import infer_signature

    network = servable(model, normalization.mean, normalization.std, multilabel=identity.multilabel)
    with torch.inference_mode():
        output = network(example).numpy()
    pixels = np.ascontiguousarray(example.numpy())
    facts = dataclasses.asdict(identity) | dataclasses.asdict(normalization) | {"precision": precision}
    if identity.multilabel:
        facts["thresholds"] = list(thresholds)
    about = {
        "metadata": {"cvdist": facts},
        # Without these, MLflow would load the model again to infer its requirements.
        "pip_requirements": [
            f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy", "pillow")
        ],
    }
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with (
        tempfile.TemporaryDirectory(prefix="cvdist-model-") as folder,
        default_store(ref.tracking_uri),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            network,
            f"{folder}/network",
            serialization_format="pt2",
            signature=infer_signature(pixels, output),
            input_example=pixels,
            **about,
        )
        try:
            mlflow.start_run(run_id=ref.run_id)
            mlflow.pyfunc.log_model(
                name="model",
                step=step,
                python_model=_SCRIPT,
                artifacts={"network": f"{folder}/network"},
                input_example=[_picture_file(example[0])],
                **about,
            )
        finally:
            # The run goes on: the process that started the job ends it.
            mlflow.end_run("RUNNING")


def _picture_file(pixels: Tensor) -> str:
    """Encode pixels, uint8 (1 or 3, H, W), as base64 of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels.numpy(), 0, -1).squeeze()).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()
