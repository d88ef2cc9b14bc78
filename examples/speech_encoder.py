"""The text encoder of a speech synthesizer as an ONNX file, for texts and batches of any size.

Symbols pass an embedding, convolutions with batch norm, and a bidirectional LSTM over packed sequences, as in the
published text-to-speech models. The file takes symbols and lengths, and is run against the model in PyTorch.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from unroll import export_onnx


class TextEncoder(nn.Module):
    def __init__(self, symbols: int = 60, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 5, padding=2), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(3)
        )
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(text).transpose(1, 2)
        for convolution in self.convolutions:
            x = convolution(x)
        packed = pack_padded_sequence(x.transpose(1, 2), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, _ = self.lstm(packed)
        return pad_packed_sequence(output, batch_first=True, total_length=text.shape[1])[0]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = TextEncoder().eval()
    batch, time = Dim("batch"), Dim("time")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        example = (torch.randint(60, (3, 12)), torch.tensor([12, 5, 9]))
        shapes = ({0: batch, 1: time}, {0: batch})
        export = export_onnx(model, example, path, dynamic_shapes=shapes, input_names=["text", "lengths"])
        print(f"{sum(export.operators.values())} nodes, among them Scan: {export.operators['Scan']}, LSTM: 0")
        session = onnxruntime.InferenceSession(path)
    print("rows  padded to  lengths                difference")
    for lengths in ([12, 5, 9], [1], [40, 40], [7, 30, 1, 30, 2], [3, 2, 3, 1]):
        text = torch.randint(60, (len(lengths), max(lengths)))
        with torch.no_grad():
            expected = model(text, torch.tensor(lengths))
        feed = {"text": text.numpy(), "lengths": torch.tensor(lengths).numpy()}
        (found,) = session.run(None, feed)
        difference = (torch.from_numpy(found) - expected).abs().max().item()
        print(f"{len(lengths):4}  {max(lengths):9}  {lengths!s:21}  {difference:10.1e}")


if __name__ == "__main__":
    main()
