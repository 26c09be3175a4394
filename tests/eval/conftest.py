"""A small random model with a tokenizer, for tests of what is scored."""

import pytest
from models import config, make_run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model as a folder that verbs take, such as an import leaves behind."""
    small = config(
        embed_dim=32, mlp_dim=64, num_layers=2, head_dim=8, attn_pattern="LG", max_seq_len=128
    )
    return make_run(tmp_path_factory.mktemp("eval") / "random", small)
