"""Log the best model as an MLflow model that loads and serves without this package and without pickle."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import logging
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cvdist.models.servable import ServableClassifier
from cvdist.tracking.run import RunRef, default_store, mlflow_client

if TYPE_CHECKING:
    from cvdist.data.dataset import DatasetInfo
    from cvdist.results import ModelIdentity

logger = logging.getLogger(__name__)


def log_model(
    ref: RunRef, model: nn.Module, identity: ModelIdentity, info: DatasetInfo, example: Tensor, step: int
) -> None:
    """Log a model with signature and input example, under the name `model`.

    It is stored in PyTorch's `pt2` format: an exported graph and tensors, without pickle. Its metadata names
    the architecture and the classes.

    Args:
        ref: The run.
        model: The model.
        identity: Architecture, classes and input shape of the model.
        info: Description of the data set, with the mean and standard deviation that pixels are normalized with.
        example: Input example, uint8 (n, C, H, W), n >= 2.
        step: The epoch that the model is from.
    """
    client = mlflow_client(ref.tracking_uri)
    outputs = client.get_run(ref.run_id).outputs
    if outputs and any(output.step == step for output in outputs.model_outputs):
        return  # already logged: a finished run was started again
    import mlflow
    from mlflow.models import infer_signature

    servable = ServableClassifier(copy.deepcopy(model).cpu(), info.mean, info.std).eval()
    # The exported graph is specific to the memory format, and callers pass contiguous tensors.
    servable = servable.to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        output = servable(example).numpy()
    pixels = np.ascontiguousarray(example.numpy())
    with default_store(ref.tracking_uri), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mlflow.start_run(run_id=ref.run_id)
            mlflow.pytorch.log_model(
                servable,
                name="model",
                step=step,
                serialization_format="pt2",
                signature=infer_signature(pixels, output),
                input_example=pixels,
                # Without these, MLflow would load the model again to infer its requirements.
                pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")],
                metadata={"cvdist": dataclasses.asdict(identity) | {"mean": info.mean, "std": info.std}},
            )
        finally:
            # The run goes on: the process that started the job ends it.
            mlflow.end_run("RUNNING")
