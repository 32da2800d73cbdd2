"""baselines/encode.py: an item's embedding is the mean of a language model's last states."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU

from baselines.encode import by_llama
from models.tokenizer import Tokenizer


def test_embeddings_are_the_mean_of_transformers_states(architecture, folder):
    texts = ["Title: red lamp", "Title: a very long blue table; Color: amber, with many words", "x"]
    found = by_llama(folder, texts, CPU)
    reference = architecture.reference.from_pretrained(folder).eval()
    for vector, ids in zip(found, Tokenizer(folder, 640).encode(texts), strict=True):
        with torch.no_grad():
            states = reference.base_model(torch.tensor([ids])).last_hidden_state[0]
        assert (vector - F.normalize(states.mean(0), dim=-1)).abs().max() < 1e-5


@pytest.mark.parametrize("encoder", ["llama:/nowhere/at-all", "/nowhere/at-all"])
def test_an_encoder_that_is_nowhere_is_named(tmp_path, data_folder, run_baselines, encoder):
    with pytest.raises(ValueError, match="/nowhere/at-all"):
        run_baselines(data=data_folder, run=tmp_path, encoder=encoder)


def test_the_embedded_model_encodes_the_demo_alone(tmp_path, data_folder, run_baselines):
    with pytest.raises(ValueError, match=r"^--encoder is needed: models/tiny, the default, knows"):
        run_baselines(data=data_folder, run=tmp_path)
