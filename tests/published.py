"""Models of published packages, with random weights: as they come, or in one that calls them with tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.people import BATCH, Person, floats


def set2set() -> nn.Module:
    """PyTorch Geometric: a readout of the nodes of many graphs, by an LSTM and attention."""
    from torch_geometric.nn.aggr import Set2Set

    class Readout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aggregate = Set2Set(4, processing_steps=3)

        def forward(self, x: Tensor, graph: Tensor, graphs: Tensor) -> Tensor:
            return self.aggregate(x, graph, dim_size=graphs.size(0))

    return Readout()


def attentive_fp() -> nn.Module:
    """PyTorch Geometric: properties of molecules, attention over bonds and GRU cells."""
    from torch_geometric.nn.models import AttentiveFP

    return AttentiveFP(5, 6, 2, edge_dim=3, num_layers=2, num_timesteps=2)


def encodec() -> nn.Module:
    """Transformers: a codec of sounds, convolutions around LSTMs, to codes and back."""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=2,
        hidden_size=8,
        num_residual_layers=1,
        upsampling_ratios=[4, 2],
        codebook_size=16,
        codebook_dim=8,
        sampling_rate=800,
        target_bandwidths=[1.6],
        normalize=False,
    )

    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = EncodecModel(config)

        def forward(self, sound: Tensor) -> Tensor:
            return self.codec(sound, return_dict=False)[1]

    return Codec()


def stanza_tokenizer() -> nn.Module:
    """Stanza: sentences and words from characters, two packed bidirectional LSTMs and convolutions."""
    from stanza.models.tokenization.model import Tokenizer

    options = {
        "feat_dim": 2,
        "rnn_layers": 1,
        "conv_res": "1,3",
        "hier_conv_res": True,
        "use_mwt": True,
        "hierarchical": True,
        "hier_invtemp": 0.5,
        "tok_noise": 0.02,
    }
    return Tokenizer(options, 20, 4, 5, dropout=0.3, feat_dropout=0.05)


def stanza_langid() -> nn.Module:
    """Stanza: the language of a text, a bidirectional LSTM over its characters."""
    from stanza.models.langid.model import LangIDBiLSTM

    letters = {"<PAD>": 0} | {chr(97 + i): i + 1 for i in range(19)}
    return LangIDBiLSTM(letters, {"de": 0, "en": 1, "fr": 2}, num_layers=2, embedding_dim=4, hidden_dim=5)


def recurrent_ppo() -> nn.Module:
    """SB3 Contrib: an actor and a critic with an LSTM each, whose states are reset where episodes start."""
    import numpy as np
    from gymnasium.spaces import Box, Discrete
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    class Acts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seen = Box(-1, 1, (4,), np.float32)
            self.policy = RecurrentActorCriticPolicy(seen, Discrete(3), lambda _: 1e-3, lstm_hidden_size=5)

        def forward(self, seen: Tensor, h: Tensor, c: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
            states = RNNStates((h, c), (h, c))
            action, value, _, after = self.policy(seen, states, starts, deterministic=True)
            return action, value, *after.pi, *after.vf

    return Acts()


def deepar() -> nn.Module:
    """GluonTS: parameters of the distribution of what comes next, an LSTM over lagged values."""
    from gluonts.torch.model.deepar.module import DeepARModel

    class Foresees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = DeepARModel("D", 6, 1, lags_seq=[1, 2, 3], hidden_size=5)

        def forward(self, kind: Tensor, static: Tensor, past: Tensor, seen: Tensor, observed: Tensor, future: Tensor):
            params, scale, *_ = self.model.unroll_lagged_rnn(kind, static, past, seen, observed, future)
            return *params, scale

    return Foresees()


def weight_drop() -> nn.Module:
    """PyTorch-NLP: an LSTM whose recurrent weights are dropped before each call."""
    from torchnlp.nn import WeightDropLSTM

    return nn.Sequential(WeightDropLSTM(3, 4, num_layers=2, weight_dropout=0.4))


def temporal_fusion() -> nn.Module:
    """PyTorch Forecasting: a temporal fusion transformer, LSTMs between selections of variables and attention."""
    from pytorch_forecasting.models.temporal_fusion_transformer import TemporalFusionTransformer

    class Foresees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TemporalFusionTransformer(
                hidden_size=8,
                attention_head_size=2,
                output_size=3,
                hidden_continuous_size=4,
                max_encoder_length=5,
                x_reals=["price", "time"],
                time_varying_reals_encoder=["price", "time"],
                time_varying_reals_decoder=["time"],
                output_transformer=lambda made: made["prediction"],
                logging_metrics=[],
            )

        def forward(self, past: Tensor, future: Tensor, lengths: Tensor, ahead: Tensor) -> Tensor:
            def nothing(of: Tensor) -> Tensor:
                return of[:, :, :0].long()

            x = {"encoder_cont": past, "encoder_cat": nothing(past), "encoder_lengths": lengths}
            x |= {"decoder_cont": future, "decoder_cat": nothing(future), "decoder_lengths": ahead}
            return self.model(x | {"target_scale": past[:, 0]})["prediction"]

    return Foresees()


def _letters(batch: int) -> Tensor:
    return torch.arange(7 * batch).reshape(batch, 7) % 19 + 1


def _molecules(atoms: int) -> tuple[Tensor, ...]:
    here = torch.arange(atoms)
    return floats(atoms, 5), torch.stack([here, here.roll(1)]), floats(atoms, 3), here * 2 // atoms


def _episodes(*starts: float) -> tuple[Tensor, ...]:
    """A step of as many episodes."""
    return floats(len(starts), 4), floats(1, len(starts), 5), floats(1, len(starts), 5), torch.tensor(starts)


def _series(batch: int) -> tuple[Tensor, ...]:
    kind, static, future = torch.zeros(batch, 1, dtype=torch.long), floats(batch, 1), floats(batch, 1, 1)
    return kind, static, floats(batch, 8, 1), floats(batch, 8), torch.ones(batch, 8), future


NODES, EDGES = {0: "nodes"}, {0: "edges"}

PUBLISHED = [
    Person(
        set2set,
        lambda: (floats(7, 4), torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.zeros(3)),
        (NODES, NODES, {0: "graphs"}),
        "export",
        lambda: (floats(5, 4), torch.tensor([0, 0, 0, 1, 1]), torch.zeros(2)),
        package="torch_geometric",
    ),
    Person(
        attentive_fp,
        lambda: _molecules(6),
        None,
        "none",
        refused="is refused by ONNX Runtime .*torch's exporter wrote that node",
        package="torch_geometric",
    ),
    Person(
        encodec,
        lambda: (floats(2, 1, 64),),
        (BATCH,),
        "trace",
        lambda: (floats(3, 1, 64),),
        package="transformers",
    ),
    Person(
        stanza_tokenizer,
        lambda: (_letters(3), floats(3, 7, 2), torch.tensor([7, 5, 2])),
        (BATCH,) * 3,
        "export",
        lambda: (_letters(2), floats(2, 7, 2), torch.tensor([7, 1])),
        package="stanza",
    ),
    Person(stanza_langid, lambda: (_letters(3),), (BATCH,), "export", lambda: (_letters(2),), package="stanza"),
    Person(
        recurrent_ppo,
        lambda: _episodes(1, 0),
        (BATCH, {1: "batch"}, {1: "batch"}, BATCH),
        "trace",
        lambda: _episodes(0, 0, 1),
        package="sb3_contrib",
        double=False,
    ),
    Person(deepar, lambda: _series(2), (BATCH,) * 6, "export", lambda: _series(3), package="gluonts"),
    Person(
        weight_drop,
        lambda: (floats(5, 2, 3),),
        ({1: "batch"},),
        "export",
        lambda: (floats(5, 3, 3),),
        package="torchnlp",
        double=False,
        time=(0, 0),
    ),
    Person(
        temporal_fusion,
        lambda: (floats(2, 5, 2), floats(2, 3, 2), torch.tensor([5, 4]), torch.tensor([3, 3])),
        (BATCH,) * 4,
        "trace",
        lambda: (floats(3, 5, 2), floats(3, 3, 2), torch.tensor([1, 5, 3]), torch.tensor([3, 3, 3])),
        package="pytorch_forecasting",
        double=False,
    ),
]
